"""Packaging metadata; the settings of the tools are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
PACKAGE = (ROOT / "vllm_kvcompress" / "__init__.py").read_text(encoding="utf-8")
(VERSION,) = re.findall(r'^__version__ = "(.+)"$', PACKAGE, re.MULTILINE)

VLLM = "vllm>=0.32,<0.33"
INSPECT = ["jinja2>=3.1", "matplotlib>=3.8", "plotly>=6"]
EVAL = [
    # LongBench's prompts and metrics.
    "lm_eval[longbench]>=0.4.13,<0.5",
    "matplotlib>=3.8",
    "pandas>=2.3",
    # RULER's own generators run on these.
    "nltk>=3.9",
    "pyyaml>=6",
    "scipy>=1.11",
    "tenacity>=8",
    "wonderwords>=3",
]
EXTRAS = {
    "eval": EVAL,
    "gpu": ["triton>=3.4", "xformers>=0.0.35"],
    "inspect": INSPECT,
    "models": [
        "gguf>=0.17,<1",
        "safetensors>=0.6.2",
        "tokenizers>=0.23",
        "transformers>=5.16",
    ],
    "dev": [
        *EVAL,
        *INSPECT,
        "httpx>=0.27",
        "hypothesis>=6.100",
        "mypy>=2.4,<3",
        "openai>=2.25",
        "pre-commit>=4",
        "pytest>=8",
        "pytest-xdist>=3.6",
        "ruff>=0.17,<0.18",
        "types-PyYAML>=6",
        # Triton's interpreter runs the kernels and vLLM's second model runner without a GPU.
        "triton>=3.4; platform_system == 'Linux'",
    ],
}

setup(
    name="vllm_kvcompress",
    version=VERSION,
    description="KV-cache eviction for vLLM: a different number of tokens in every layer",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=[
        *find_packages(include=["vllm_kvcompress", "vllm_kvcompress.*"]),
        *find_packages("kernels"),
    ],
    package_dir={"kvcompress_kernels": "kernels/kvcompress_kernels"},
    package_data={
        "vllm_kvcompress": ["py.typed", "tools/inspection/*.j2"],
        "kvcompress_kernels": ["py.typed"],
    },
    entry_points={
        "console_scripts": ["kvcompress = vllm_kvcompress.tools.cli:main"],
        # By either name in VLLM_PLUGINS; loading both changes nothing.
        "vllm.general_plugins": [
            "kvcompress = vllm_kvcompress.engine.plugin:register",
            "vllm_kvcompress = vllm_kvcompress.engine.plugin:register",
        ],
    },
    install_requires=[
        "msgspec",
        "numpy",
        "prometheus_client",
        "rich>=13",
        "torch>=2.10",
        "tqdm",
        VLLM,
    ],
    extras_require=EXTRAS,
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
