"""Reading and writing what lies outside: models, tokenizers and adapters in their file formats."""
