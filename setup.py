"""Packaging metadata of megadiff; tool settings are in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent

setup(
    name="megadiff",
    version="0.1.0",
    description="Pretraining of discrete diffusion language models on Megatron-Core",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10,<3.14",
    packages=find_packages(include=["megadiff", "megadiff.*"]),
    package_data={"megadiff.scaling": ["published/*.yaml"]},
    entry_points={"console_scripts": ["megadiff = megadiff.__main__:main"]},
    install_requires=[
        "torch>=2.10",
        "megatron-core>=0.16,<0.20",
        "psutil",  # megatron-core needs it to save a checkpoint and does not declare it
        "numpy>=1.26",
        "pyyaml>=6.0",
        "pydantic>=2.7,<3",
        "tokenizers>=0.20",
        "sentencepiece>=0.2",
        "orjson>=3.9",
        "zstandard>=0.22",
        "safetensors>=0.5",
        "filelock>=3.12",
        "rich>=13",
        "scipy>=1.11",
        "tensorboard>=2.15",
    ],
    extras_require={
        "fast": ["numba>=0.61"],  # noising in machine code
        "te": ["transformer-engine[pytorch]>=2.9,<2.12"],
        "hf": ["transformers>=4.57,<6"],
        "eval": ["lm-eval>=0.4.9"],
        "parquet": ["pyarrow>=15"],
        "fsspec": ["fsspec>=2024.2", "s3fs>=2024.2", "gcsfs>=2024.2", "huggingface_hub>=0.20"],  # corpora from URLs
        "gigatoken": ["gigatoken>=0.10"],  # tokenizing several times as fast
        "plot": ["matplotlib>=3.7"],
        "wandb": ["wandb>=0.19"],
        "docs": (ROOT / "requirements/docs.txt").read_text(encoding="utf-8").split(),
        "dev": [
            "pytest>=8",
            "pytest-xdist>=3.5",
            "pytest-timeout>=2.3",
            "hypothesis>=6.100",
            "jaxtyping>=0.2.36",
            "beartype>=0.19",
            "matplotlib>=3.7",
            "transformers>=4.57,<6",
            "lm-eval>=0.4.9",
            "pyarrow>=15",
            "ruff>=0.6",
            "pyright>=1.1.380",
            "import-linter>=2.0",
            "numba>=0.61",
            "triton>=3.6; sys_platform == 'linux'",  # interpreted and compiled in tests; a CUDA torch brings its own
        ],
    },
)
