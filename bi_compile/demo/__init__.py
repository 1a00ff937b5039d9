"""The demonstration: real engines and models, requests alone and together, bits compared as bits."""
