"""Pictures, captions and buckets: from a folder to batches of cached latents."""
