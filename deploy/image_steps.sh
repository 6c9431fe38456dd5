#!/bin/sh
# The steps that make the image's Python tree; deploy/Dockerfile and `make image-steps` run this same file.
#   image_steps.sh TREE cpu|cuda      from the repository's root; TREE is where the environment goes
set -eu
tree=$1
device=$2
python=${PYTHON:-python3}
extras=otel,redis,s3,signing,train

"$python" -m venv "$tree"
pip="$tree/bin/python -m pip --disable-pip-version-check --no-cache-dir"
torch=$(grep '^torch==' constraints.txt)
case $device in
  # the build without CUDA libraries; where the usual index has none, TORCH_INDEX names one that has
  cpu)
    $pip install --quiet ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} -c constraints.txt "$torch"
    "$tree/bin/python" -W ignore -c 'import torch, sys; sys.exit(torch.version.cuda is not None)' \
      || { echo "this torch carries CUDA: set TORCH_INDEX to PyTorch's index of CPU wheels" >&2; exit 1; } ;;
  # the wheels with CUDA, gigabytes of them, and the kernels' compiler that comes with them
  cuda) $pip install --quiet ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "${torch%%+*}"; extras=$extras,cuda ;;
  *) echo "device $device: give cpu or cuda" >&2; exit 2 ;;
esac
if [ "$device" = cuda ]; then grep -v '^torch==\|^triton==' constraints.txt > "$tree/constraints.txt"
else cp constraints.txt "$tree/constraints.txt"; fi
$pip install --quiet -c "$tree/constraints.txt" ".[$extras]"
# nothing is compiled at run time: the root is read-only
# (files that are no valid Python, such as templates, are passed over)
"$tree/bin/python" -m compileall -q -j 0 "$tree/lib" > /dev/null || :
