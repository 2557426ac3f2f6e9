"""Adapters: configuration, fold to low-rank edits, edit masks, rank pages and the device bank."""
