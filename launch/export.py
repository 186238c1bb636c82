"""Write the networks of a run as safetensors files for use elsewhere.

    python launch/export.py --run runs/sky --out exported/

Gives model.safetensors (plain weights), ema.safetensors (averaged), config.yaml and latent_space.json. All programs
that take a run_dir take such a folder as well.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that is not installed

from ardiff import cli
from ardiff.training.weights import export


def main() -> int:
    """The program."""
    parser = cli.parser(
        "Write the networks of a run as safetensors files.", "python launch/export.py --run runs/sky --out exported"
    )
    parser.add_argument("--run", type=Path, required=True, help="a run_dir or a checkpoint of it")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    options = parser.parse_args()
    print(f"{export(options.run, options.out)} exported to {options.out}")
    return cli.EXIT_OK


if __name__ == "__main__":
    cli.run(main)
