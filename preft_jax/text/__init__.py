"""Text: chats, tokenizers, and streams from token ids to text."""
