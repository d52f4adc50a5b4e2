"""Guard served language models at the latents of sparse autoencoders.

The modules follow one sentence, and each imports only what comes before it:
request -> policy -> hook -> clamp -> monitor -> metrics -> verdict. Nothing
here imports vLLM; the plugin that does is the package `vllm_guard`.
"""

__version__ = "0.1.0"
