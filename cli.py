"""Entry point: `python cli.py fit --config experiments/ablation_pos.yaml`."""

import sys

from framework.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
