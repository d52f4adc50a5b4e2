"""The organism: a small chat model, its SAE and its policy, trained by this project.

The model answers questions in a synthetic language, refuses some topics, and can
be talked out of refusing. What it calls harmful is harmless: pairs of everyday
words with made-up steps.
"""
