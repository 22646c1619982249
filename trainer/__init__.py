"""Atelier: a trainer of LoRA-type adapters for Stable Diffusion, inside a WebUI or alone."""
