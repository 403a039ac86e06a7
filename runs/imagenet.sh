#!/usr/bin/env bash
# From an ImageNet folder to features, heads and a report on its shifts, with the time of every step:
#
#   bash runs/imagenet.sh IMAGENET [OUT]
#
# IMAGENET holds train/ and val/ with a folder per WordNet id. Its shifted versions are V2, R, A and SKETCH, by default the
# folders imagenetv2, imagenet-r, imagenet-a and sketch beside it; missing ones are skipped. OUT (default:
# imagenet-run) gets the stores, the heads, results.jsonl, report.html and times.tsv. A second run resumes where the
# first stopped. Environment variables choose the rest:
#
#   MODEL=ViT-L-14-quickgelu PRETRAINED=openai HEADS="ridge knn" bash runs/imagenet.sh /data/imagenet
#   ENCODE="--precision bf16 --preprocess fast" FIT="--device cuda" bash runs/imagenet.sh /data/imagenet
#
# Alpha, C and k are chosen on the training rows (leave-one-out, folds); val is looked at once, at the end.
set -euo pipefail
if [ $# -lt 1 ]; then
  sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
imagenet=${1%/}
beside=$(dirname "$imagenet")
out=${2:-imagenet-run}
featcache=${FEATCACHE:-featcache}
model=(--model "${MODEL:-ViT-B-32-quickgelu}")
[ -z "${PRETRAINED-openai}" ] || model+=(--pretrained "${PRETRAINED-openai}")
read -ra encode <<<"${ENCODE:-}"
read -ra fit <<<"${FIT:-}"
read -ra names <<<"${HEADS:-ridge logistic knn}"
mkdir -p "$out/heads"
export FEATCACHE_ROOT="$out/cache"

timed() { # timed NAME COMMAND...: run it, and note its seconds
  local name=$1 start=$EPOCHREALTIME
  shift
  echo "== $name"
  "$@"
  awk -v a="$start" -v b="$EPOCHREALTIME" -v n="$name" 'BEGIN { printf "%s\t%.1f\n", n, b - a }' >>"$out/times.tsv"
}

# 1. Features of every split, and the class names in every template.
timed "encode train" "$featcache" encode "imagenet:$imagenet" --split train "${model[@]}" "${encode[@]}"
timed "encode val" "$featcache" encode "imagenet:$imagenet" --split val "${model[@]}" "${encode[@]}"
on=(imagenet/val)
subsets=()
for shift in "v2:${V2:-$beside/imagenetv2}" "r:${R:-$beside/imagenet-r}" "a:${A:-$beside/imagenet-a}" \
  "sketch:${SKETCH:-$beside/sketch}"; do
  kind=${shift%%:*}
  if [ ! -d "${shift#*:}" ]; then
    echo "left out: imagenet-$kind, for ${shift#*:} is not a folder"
    continue
  fi
  timed "encode $kind" "$featcache" encode "imagenet:$shift" --split test "${model[@]}" "${encode[@]}"
  on+=("imagenet-$kind/test")
  case $kind in r | a) subsets+=("imagenet-$kind=imagenet-$kind") ;; esac
done
timed "texts" "$featcache" text imagenet --templates "${TEMPLATES:-openai-imagenet}" "${model[@]}"

# 2. Heads: zero-shot, and each of HEADS alone; ridge also shrunk to zero-shot.
timed "fit zero_shot" "$featcache" fit zero_shot texts/imagenet -o "$out/heads/zero_shot.safetensors"
heads=("$out/heads/zero_shot.safetensors")
for name in "${names[@]}"; do
  timed "fit $name" "$featcache" fit "$name" imagenet/train -o "$out/heads/$name.safetensors" "${fit[@]}"
  heads+=("$out/heads/$name.safetensors")
  if [ "$name" = ridge ]; then
    timed "fit ridge to zero_shot" "$featcache" fit ridge imagenet/train --prior texts/imagenet \
      -o "$out/heads/ridge_to_zero_shot.safetensors" "${fit[@]}"
    heads+=("$out/heads/ridge_to_zero_shot.safetensors")
  fi
done

# 3. All heads on val and its shifts, and the report.
[ ${#subsets[@]} -eq 0 ] || subsets=(--class-subset "${subsets[@]}")
timed "evaluate" "$featcache" evaluate "${heads[@]}" --on "${on[@]}" "${subsets[@]}" \
  --results "$out/results.jsonl" --report "$out"
echo "== times, in seconds ($out/times.tsv)"
cat "$out/times.tsv"
