"""The machine at hand: its facts and rates, and what `hf-lema doctor` makes of them."""
