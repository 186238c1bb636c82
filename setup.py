"""Packaging of ardiff: `pip install -e .[test]` for development, `pip install .[cuda]` on a GPU node."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="ardiff",
    version="0.1.0",
    description="Training and sampling of asynchronous (auto-regressive) video diffusion models",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10,<3.13",
    packages=find_packages(include=["ardiff", "ardiff.*", "data_tools", "data_tools.*", "launch"]),
    package_data={"ardiff": ["presets/*.yaml"]},
    install_requires=[
        "torch>=2.11,<2.14",
        "deepspeed>=0.19.8,<0.20",
        "webdataset>=1.0.2",
        "einops>=0.8",
        "tensorboard>=2.18",
        "omegaconf>=2.4",
        "safetensors>=0.5",
        "av>=14",
        "pillow>=10",
        "numpy>=1.26",
        "tqdm>=4.66",
        "pyyaml>=6",
        "braceexpand>=0.1.7",
        "fsspec[http]>=2024.6",
        "scenedetect-headless>=0.7",
        "imagehash>=4.3",
        "nvidia-ml-py>=12.560",
    ],
    extras_require={
        "s3": ["s3fs>=2024.6"],
        "gcs": ["gcsfs>=2024.6"],
        "cuda": ["flash-attn>=2.7.1", "xformers==0.0.35"],
        "test": [
            "pytest>=8",
            "pytest-xdist>=3.6",
            "pytest-timeout>=2.3",
            "ruff>=0.9",
            "mypy>=1.14",
            "types-PyYAML",
            "types-tqdm",
        ],
        "dev": ["ardiff[test]", "pre-commit>=4"],
    },
)
