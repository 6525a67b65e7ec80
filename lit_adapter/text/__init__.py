"""Text to token ids and back: tokenizers of every LLaMA generation, and prompt templates."""
