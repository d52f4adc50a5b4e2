"""What comes back through what the clamp does not hold: attacks on a clamped model.

Engine-free, on a Hugging Face model: hooks that clamp, edits placed behind them, and
what a serving engine would see of the result (arXiv 2606.18322).
"""
