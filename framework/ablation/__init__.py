"""One config document with an `ablation:` section: its cells, the processes that run them, the table they give."""
