"""Folders of Hugging Face's transformers: models written as one, and read from one."""
