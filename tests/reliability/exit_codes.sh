#!/usr/bin/env bash
# Every exit code of the contract, as a shell script under `set -e` meets it; prints `code NAME` lines, one a command.
# Needs $CVTRAIN, the command, and an empty current folder.
set -euo pipefail

quick=(epochs=2 limit_train_batches=4 threads=1 compression=none export=none logger=none plots=false report=false)
long=(epochs=400 threads=1 compression=none export=none logger=none plots=false report=false save_every_steps=20)

code() { # code NAME COMMAND…: what the command left with; `set -e` does not see it
  local name=$1 code=0
  shift
  "$@" >"$name.out" 2>"$name.err" || code=$?
  echo "$code $name"
}

trains() { # waits for a checkpoint below the folder $1 of the process $2
  for _ in $(seq 6000); do
    compgen -G "$1/*/*/weights/last.safetensors" >/dev/null && return 0
    kill -0 "$2" 2>/dev/null || return 1
    sleep 0.02
  done
  return 1
}

begun() { # begun FOLDER OVERRIDE…: starts a long run behind the script, and waits until it trains
  local folder=$1
  shift
  $CVTRAIN "${long[@]}" "$@" output_dir="$folder" >"$folder.out" 2>"$folder.err" &
  pid=$!
  trains "$folder" "$pid"
}

mkdir -p conf/model mine
echo '_target_: mine.Broken' >conf/model/broken.yaml
echo '_target_: mine.Huge' >conf/model/huge.yaml
cat >mine/__init__.py <<'PY'
import torch
from torch import nn


class Broken(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.layer = nn.Linear(64, num_classes)

    def forward(self, images):
        return self.layer(images.flatten(1)) / (1 // 0)


class Huge(Broken):
    def forward(self, images):
        return self.layer(torch.empty(len(images), 1 << 50).sum() + images.flatten(1))
PY

code done $CVTRAIN "${quick[@]}" output_dir=done
code finished $CVTRAIN "${quick[@]}" output_dir=done resume=auto
code bug $CVTRAIN -cd conf model=broken 'trusted=[mine]' "${quick[@]}"
code config $CVTRAIN epoch=2
code data $CVTRAIN data=cifar10 data.root=/nowhere data.download=false
head -c 3000 /dev/urandom >torn.safetensors
touch x.png
code weights $CVTRAIN predict weights=torn.safetensors source=x.png
code diverged $CVTRAIN "${quick[@]}" optimizer.lr=1e30
code storage $CVTRAIN "${quick[@]}" output_dir=/proc/nowhere
code memory $CVTRAIN -cd conf model=huge 'trusted=[mine]' "${quick[@]}"

begun worker loader=host workers=2
while kill -0 "$pid" 2>/dev/null; do # one that has nothing left to do in its epoch is not missed
  pgrep -P "$pid" | head -1 | xargs -r kill -9 2>/dev/null || true
  sleep 0.1
done
code worker wait "$pid"

begun stopped
run=$(dirname "$(dirname "$(ls stopped/*/*/weights/last.safetensors)")")
code locked $CVTRAIN "${long[@]}" output_dir=stopped resume="$run"
kill -INT "$pid"
code sigint wait "$pid"
$CVTRAIN "${long[@]}" output_dir=stopped resume=auto >again.out 2>again.err &
pid=$!
until grep -q 'resume: goes on' again.out; do kill -0 "$pid"; sleep 0.02; done
sleep 1
kill -TERM "$pid"
code sigterm wait "$pid"
