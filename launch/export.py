"""Write the networks of a run as safetensors files for use elsewhere.

    python launch/export.py --run runs/sky --out exported/
    python launch/export.py --run runs/arvae --ema 0.999 --out chosen/   # for programs that take the main average

Gives model.safetensors (plain weights), ema.safetensors (averaged), config.yaml and latent_space.json, and a file such
as ema_0.999.safetensors for each of train.extra_ema_decays. All programs that take a run_dir take such a folder too.
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
    parser.add_argument("--ema", type=float, metavar="DECAY", help="which average is the main one of the export, "
                        "ema.safetensors (default that of the run)")  # fmt: skip
    options = parser.parse_args()
    print(f"{export(options.run, options.out, options.ema)} exported to {options.out}")
    return cli.EXIT_OK


if __name__ == "__main__":
    cli.run(main)
