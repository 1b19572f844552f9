"""Everything that makes the demo model: data generation, tokenizer, training and export."""
