"""Let a CUDA build of torch be imported on a machine without NVIDIA's libraries.

    cuda_stand_ins.py SITE_PACKAGES/torch

PyPI has older torch releases only as CUDA builds. Their shared objects are linked to libcudart, libcublas and so on,
gigabytes that a CPU run never calls. This finds every symbol they miss, compiles tiny libraries of the right names
in which each such function returns an error code, and puts them into torch/lib, where torch looks first. Then it
frees the disk blocks of the GPU code inside torch's own libraries (they read as zeros afterwards).

Needs gcc, and readelf and nm from binutils.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

#: Which library a symbol without a telling version belongs to: the first whose prefix fits.
LIBRARY_OF_PREFIX = (
    ("cudnn", "libcudnn"),
    ("nccl", "libnccl"),
    ("cupti", "libcupti"),
    ("cusparselt", "libcusparseLt"),
    ("cublaslt", "libcublasLt"),
    ("cublas", "libcublas"),
    ("cusparse", "libcusparse"),
    ("cusolver", "libcusolver"),
    ("cufft", "libcufft"),
    ("curand", "libcurand"),
    ("cufile", "libcufile"),
    ("nvshmem", "libnvshmem"),
    ("nvrtc", "libnvrtc"),
    ("cuda", "libcudart"),
    ("nvtx", "libnvtx"),
    ("nvml", "libnvidia-ml"),
    ("cu", "libcuda"),
)
#: 100 is cudaErrorNoDevice, the honest answer to nearly everything.
DEFAULT_BODY = "int {}() {{ return 100; }}"
#: Functions that torch calls even without a device.
BODIES = {
    "cudaGetErrorString": 'const char *{}() {{ return "no CUDA here"; }}',
    "cudaGetErrorName": 'const char *{}() {{ return "no CUDA here"; }}',
    "cuptiGetResultString": 'int {}(int code, const char **text) {{ *text = "no CUPTI here"; return 0; }}',
    "ncclGetErrorString": 'const char *{}() {{ return "no NCCL here"; }}',
    "cudaGetLastError": "int {}() {{ return 0; }}",
    "cudaPeekAtLastError": "int {}() {{ return 0; }}",
    "cudaGetDeviceCount": "int {}(int *count) {{ if (count) *count = 0; return 100; }}",
    "cudaDriverGetVersion": "int {}(int *version) {{ *version = 0; return 0; }}",
}
#: Sections that hold GPU code; only large ones are worth a hole.
GPU_SECTION = re.compile(r"\]\s+(?:\.nv_fatbin|__nv_relfatbin|\.nvFatBinSegment_x)\s+PROGBITS\s+\w+\s+(\w+)\s+(\w+)")
WORTH_A_HOLE = 1 << 20


def output_of(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def missing(libraries: list[Path]) -> dict[str, dict[str, list[str]]]:
    """What the libraries need and nobody has: library name -> symbol version ("" without one) -> symbols."""
    own = {path.name for path in libraries}
    needed: dict[str, dict[str, list[str]]] = {}
    defined: set[str] = set()
    undefined: dict[str, None] = {}
    for path in libraries:
        for name in re.findall(r"\(NEEDED\).*\[(.*?)\]", output_of("readelf", "-dW", path)):
            if name not in own and re.match(r"lib(cu|nv|nccl)", name):
                needed.setdefault(name, defaultdict(list))
        for line in output_of("nm", "-D", path).splitlines():
            *_, kind, symbol = line.split()
            if kind == "U":
                undefined[symbol] = None
            else:
                defined.add(symbol.split("@")[0])
    for symbol in undefined:
        name, _, version = symbol.partition("@")
        version = version.lstrip("@")
        ours = re.match(r"_*(cu|nv|nccl|Nv|CU)", name)
        systems = re.match(r"(GLIBC|GCC|CXXABI|GOMP|OMP|OPENMP|VERSION|ZLIB)", version)
        if ours and not systems and name not in defined:
            needed[library_of(name, version, list(needed))][version].append(name)
    return needed


def library_of(symbol: str, version: str, libraries: list[str]) -> str:
    """The library a symbol is looked for in: the one its version is named after, else by its prefix."""
    if version in libraries:
        return version
    for prefix, library in LIBRARY_OF_PREFIX:
        if symbol.lstrip("_").lower().startswith(prefix):
            for name in libraries:
                if name.split(".so")[0].startswith(library):
                    return name
    return libraries[0]


def compile_library(path: Path, symbols: dict[str, list[str]]) -> None:
    """Make one stand-in, with the symbol versions the linker will ask for."""
    names = dict.fromkeys(name for group in symbols.values() for name in group)
    command = ["gcc", "-shared", "-fPIC", "-w", "-O0", f"-Wl,-soname,{path.name}", "-o", str(path)]
    with tempfile.TemporaryDirectory() as folder:
        source, script = Path(folder, "stand_in.c"), Path(folder, "versions.map")
        source.write_text("".join(BODIES.get(name, DEFAULT_BODY).format(name) + "\n" for name in names))
        script.write_text(
            "".join(
                f"{version} {{ global: {' '.join(name + ';' for name in group)} }};\n"
                for version, group in symbols.items()
                if version
            )
        )
        if script.stat().st_size:
            command.append(f"-Wl,--version-script,{script}")
        subprocess.run([*command, str(source)], check=True)


def free_gpu_code(path: Path) -> int:
    """Punch holes where a library holds code for GPUs; the number of bytes freed."""
    freed = 0
    for offset, size in GPU_SECTION.findall(output_of("readelf", "-SW", path)):
        if int(size, 16) > WORTH_A_HOLE:
            hole = ["-o", str(int(offset, 16)), "-l", str(int(size, 16))]
            # a file system without holes keeps the code, and all works as well
            done = subprocess.run(["fallocate", "--punch-hole", *hole, str(path)], stderr=subprocess.DEVNULL)
            freed += 0 if done.returncode else int(size, 16)
    return freed


def main(torch: Path) -> None:
    libraries = [path for path in (torch / "lib").glob("*.so*") if not path.is_symlink()] + [*torch.glob("_C*.so")]
    stand_ins = missing(libraries)
    for name, symbols in stand_ins.items():
        compile_library(torch / "lib" / name, symbols)
    freed = sum(map(free_gpu_code, libraries))
    print(f"{len(stand_ins)} stand-ins for NVIDIA libraries, {freed / 1e9:.1f} GB of GPU code freed")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
