"""Mistakes that users make, one per line: the message, one line without a traceback, and the exit code.

A row of `MISTAKES` is a command line, and words that the message must hold: what was got, what was expected, or what to
do. The exit code is 2 unless the row says otherwise (`featcache.errors`).
"""

import contextlib
import io
import os
import shlex
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from featcache.cli.main import VERBS, main

MISTAKES = """
encoed digits | unknown verb 'encoed'; did you mean 'encode'?
evalute ridge.safetensors --on digits/test | 'evalute'; did you mean 'evaluate'?
finetuen digits | did you mean 'finetune'?
help encoed | did you mean 'encode'?
frobnicate | unknown verb 'frobnicate'; expected one of encode, text
encode | required: DATA; see `featcache encode --help`
encode digit | unknown source 'digit', did you mean 'digits'?
encode digits --split tset | no split 'tset'; expected one of train (1,000), val (297), test (500)
encode digits --splitt test | --splitt; did you mean '--split'?
encode digits --model RN5O | 'RN5O'; did you mean RN50?
encode digits --split val --model ViT-B-32 | ViT-B-32 needs weights; give a checkpoint file; openai
encode digits --split val --model ViT-B-32 --pretrained openia | --pretrained openia; one of the tags openai
encode digits --split val --device gpu | --device gpu; expected cpu, cuda
encode digits --split val --device cuda:77 | --device cuda:77; leave --device out
encode digits --split val --batch-size 0 | --batch-size: '0', expected a whole number from 1
encode digits --split val --batch-size many | 'many', expected a whole number from 1
encode digits --split val --workers -1 | '-1', expected a whole number from 1
encode digits --split val --chunk-rows 0 | --chunk-rows: '0', expected a whole number from 1
encode digits --split val --precision fp8 | 'fp8'; fp32; bf16
encode digits --split val --views -1 | --views: '-1', expected a whole number from 0
encode digits --split val --views 99999999 | --views: '99999999', expected a whole number from 0 to 10,000
encode digits --split val --views 2 --augmentation heavy | 'heavy'; wise_ft
encode digits --split val --tap layer99 | no tap 'layer99'; it has pre_projection
encode digits --split val --shard 3/2 | shard 3 of 2: expected an index from 0
encode digits --split val --shard x | --shard x: expected i/n; such as 0/4
encode digits --split val --max-bad x | 'x', expected a whole number from 0
encode digits --split val --root x.png | --root x.png: expected a folder, got a file
encode digits --split val --name '' | --name '': expected a name
encode digits --split val --preprocess squash | 'squash'; central-crop
encode digits --labels words | 'words'; names; int
encode imagefolder:nowhere | nowhere: no such folder; check the path
encode imagefolder: | expected a path after the colon
encode pictures | 'pictures' is a folder, without a source; did you mean imagefolder:pictures?
encode list:missing.txt | missing.txt: no such file; check the path
encode list:not.txt | none of its 1 images exist; name the folder that paths start from
encode table:missing.csv | missing.csv: no such file
encode table:table.csv | no column label; there are file, klass
encode webdataset:none.tar | none.tar: no such file
encode torchvision:NoSuch | expected torchvision:CLASS:ROOT, such as torchvision:CIFAR10:DIR
encode wilds:nothing | expected wilds:NAME:DIR; fmow, iwildcam
encode arrays:nowhere | holds no .npy file; check the folder
encode objectnet:nowhere | unknown source 'objectnet'; one of the sources arrays
text | expected class names; --random M
text digitz | class names 'digitz': no such file; imagenet
text missing.txt | 'missing.txt': no such file; expected a file
text empty.txt | empty.txt: no class name in it; write one per line
text digits --templates nosuch | templates 'nosuch'; the named sets are bare
text digits --templates plain.txt | plain.txt:1: got 'a photo'; expected a string with {}
text digits --prompts missing.json | missing.json: no such file
text digits --prompts bad.json | bad.json:1: not JSON; expected {class name: [sentence, ...]}
text --random 0 | --random: '0', expected a whole number from 1
text --random 5 --length 0 | --length: '0', expected a whole number from 1
text digits --model tiny --pretrained x | `tiny` has its own weights; leave --pretrained out
text digits --device quantum | --device quantum; expected cpu, cuda
list --root nowhere | --root nowhere: no such folder; name the folder of the stores
list digits | unrecognized arguments: digits; see `featcache list --help`
info | required: STORE
3 info digits/tset | no store of that name; similar: digits/test@tiny; `featcache list`
3 info nowhere | nowhere: no such folder, and no store of that name
3 info digits/test@other | digits/test@other; similar: digits/test@tiny
3 verify digits/none | digits/none; `featcache list` shows all
verify digits/test --against nowhere | unknown source 'nowhere'; Expected source:argument
3 rm digits/none | digits/none: no such folder
rm | required: STORE
pack digits/test | required: FILE
unpack none.tar | No such file or directory; expected what `featcache pack` wrote
rename digits/test | required: NAME
3 rename digits/none new | digits/none; similar
rename digits/test '' | expected NAME/SPLIT, or NAME
relabel digits/test zorro=z | 'zorro': no class has that name; did you mean 'zero'?
relabel digits/test zero | 'zero': expected OLD=NEW, such as
5 relabel digits/test --classes three.txt | 3 class names for 10 classes; give one per class
relabel digits/test | expected OLD=NEW for some classes, or --classes FILE
gc --older-than soon | --older-than soon: expected a number with s, m, h or d
3 gc digits/none | digits/none; `featcache list`
export digits/test out.xyz | cannot export to 'xyz'; expected one of
3 export digits/none out.csv | digits/none; similar
export digits/test out --format xls | 'xls'; parquet
export digits/test out --dtype int8 | 'int8'; float16
export digits/test pictures/a/1.png/out.csv | pictures/a/1.png; check the path
export texts/digits out.csv | text stores are written as .ckpt or .msgpack
export digits/test | required: TARGET
import missing.npz --encoder-name m --name n | missing.npz: no such file
import other.npz --name n | required: --encoder-name
import x.png --encoder-name m --name n | x.png: unknown kind of file; .npz
import nothing.npz --encoder-name m --name n | holds 'a'; expected one of features
import short.npz --encoder-name m --name n | labels are int64 (5,); expected 6 integers
import other.npz --encoder-name m --name n --labels missing.txt | missing.txt
import other.npz --encoder-name m --name n --logit-scale abc | invalid float value: 'abc'
import other.npz --encoder-name m --name n --logit-scale -1 | logit scale -1.0: expected a positive number
import other.npz --encoder-name m --name n --classes empty.txt | empty.txt: contains no class names
import nan.npz --encoder-name m --name n | NaN or infinite features in 1 row, first row 2; remove them
completion ksh | 'ksh'; bash; zsh
doctor --root x.png | --root x.png: expected a folder, got a file
fit rigde digits/val -o new.safetensors | unknown head 'rigde'; did you mean ridge?
fit ridge | required: STORE, -o/--output
fit ridge digits/val | required: -o/--output
3 fit ridge digits/none -o new.safetensors | digits/none; similar: digits/test@tiny
fit ridge digits/val -o new.safetensors --set alpha=1 | --set alpha=1: expected NAME=VALUE with one of add_prior, alphas
fit ridge digits/val -o new.safetensors --set alphas=1,2 | '1,2' is not a JSON value; quote strings twice
fit ridge digits/val -o new.safetensors --set alphas | --set alphas: expected NAME=VALUE
fit ridge digits/val -o new.safetensors --set alphas=[-1] | alphas is [-1], expected a number above 0; list of numbers
fit ridge digits/val -o new.safetensors --set metric=accuracy | 'accuracy' is not a JSON value; quote strings twice
fit ridge digits/val -o new.safetensors --set 'metric="accuracy"' | is 'accuracy', expected 'auto', 'nll', 'top1' or
fit ridge digits/val -o new.safetensors --set cv=1 | ridge.cv is 1, expected 'loo', or a whole number from 2
3 fit ridge digits/val -o new.safetensors --select digits/none | digits/none
5 fit ridge digits/val -o new.safetensors --select other/test | split other/test; encode both with one model
fit ridge digits/val -o new.safetensors --prior missing.safetensors | missing.safetensors
fit ridge digits/val -o new.safetensors --prior knn.safetensors | knn is not linear
fit knn digits/val -o new.safetensors --prior zero_shot.safetensors | knn takes no prior; leave it out
fit zero_shot digits/val -o new.safetensors | a store of images; zero_shot fits from a store of texts
fit ridge texts/digits -o new.safetensors | a store of texts; ridge fits from one store of images
fit tip_adapter digits/val -o new.safetensors | tip_adapter needs a text store; `featcache text`
fit ridge digits/val other/test -o new.safetensors | one store of images, got 2
fit ridge digits/val -o pictures | pictures: is a folder; name a file
fit knn digits/val -o new.safetensors --set n_neighbors=0 | n_neighbors is 0, expected a whole number from 1
fit knn digits/val -o new.safetensors --set 'index="annoy"' | index is 'annoy', expected 'exact'
fit adamw digits/val -o new.safetensors --set epochs=10000000 | expected a whole number from 1 to 1,000,000
fit logistic digits/val -o new.safetensors --set C=0 | C is 0; a number above 0
fit ridge digits/val -o new.safetensors --device gpu | device 'gpu' cannot be used; expected e.g. cuda
fit ridge digits/val -o new.safetensors --device meta | device 'meta' cannot be used; expected e.g. cuda
evaluate ridge.safetensors | required: --on
evaluate --on digits/test | required: HEAD
evaluate missing.safetensors --on digits/test | missing.safetensors: no such file; expected a head
evaluate x.png --on digits/test | x.png: cannot be read as a head
3 evaluate ridge.safetensors --on digits/none | digits/none; similar
5 evaluate ridge.safetensors --on other/test | fitted on features of encoder; encode 'other' with the head's
evaluate ridge.safetensors --on texts/digits | a store of texts; expected a store of images
evaluate ridge.safetensors --on digits/test --metric top2 | --metric top2; give --select STORE
evaluate ridge.safetensors --on digits/test --alphas 0.5 | --alphas interpolates two heads, got 1; name two
evaluate ridge.safetensors zero_shot.safetensors --on digits/test --alphas half | invalid float value: 'half'
evaluate ridge.safetensors --on digits/test --select digits/val | --select goes with --alphas
evaluate ridge.safetensors --on digits/test --class-subset nosuch.txt | --class-subset nosuch.txt; a file of class names
5 evaluate ridge.safetensors --on digits/test --class-subset not.txt | missing ['no such thing']
evaluate ridge.safetensors --on digits/test --group patient | no metadata column 'patient'
evaluate ridge.safetensors --on digits/test --projection missing.json | missing.json; expected JSON
evaluate ridge.safetensors --on digits/test --intervals 1 | got 1 draws; expected 2 to 10,000,000
evaluate ridge.safetensors --on digits/test --intervals lots | invalid int value: 'lots'
evaluate ridge.safetensors --on digits/test --against nosuch | --against nosuch: expected published
evaluate ridge.safetensors --on digits/test --reference nosuch | reference 'nosuch' is not one of the stores digits
evaluate ridge.safetensors --on digits/test --per-sample nowhere/x | must end in .npz or .parquet
evaluate ridge.safetensors --on digits/test --name a b c | names a, b, c: expected 1 different
evaluate ridge.safetensors --on digits/test --results pictures | pictures: is a folder; name a file
evaluate ridge.safetensors --on digits/test --report | --report: expected one argument
compare ridge.safetensors knn.safetensors | required: STORE
compare ridge.safetensors missing.safetensors digits/test | missing.safetensors: no such file
compare ridge.safetensors knn.safetensors digits/test --draws 0 | got 0 draws; expected 2
compare ridge.safetensors knn.safetensors digits/test --level 2 | level 2.0; between 0 and 1
compare ridge.safetensors knn.safetensors digits/test --cluster patient | no metadata column 'patient'
compare ridge.safetensors knn.safetensors digits/test --seed -1 | got seed -1, expected a whole number >= 0
predict ridge.safetensors | required: IMAGES
predict ridge.safetensors missing.png | missing.png: no such file; expected a file, a folder
predict ridge.safetensors x.png --top 0 | top = 0; expected at least 1
predict missing.safetensors x.png | missing.safetensors: no such file
predict ridge.safetensors @missing.txt | no such list file: missing.txt
retrieve digits/test | got 0 of TEXTS, --captions, --caption-column; expected one of them
3 retrieve digits/test texts/none | texts/none; similar: texts/digits@tiny
retrieve digits/test texts/digits --k 0 | k = [0], expected positive numbers
retrieve digits/test --captions missing.json | missing.json: no such file; expected JSON {sample id: [caption, ...]}
retrieve digits/test --caption-column words | no metadata column 'words'
sweep ridge | nothing to report on; name at least one test store with --on
sweep rigde --train digits/val --on digits/test | unknown head 'rigde'; did you mean ridge?
sweep ridge --train digits/val --on digits/test --grid ridge.alphas | expected ridge.NAME=VALUE
sweep ridge --train digits/val --on digits/test --grid alphas=[1] | expected HEAD.NAME=VALUE
sweep ridge --train digits/val --on digits/test --set logistic.C=1 | one of the heads ridge
sweep ridge --train digits/val --on digits/test --shots 0 | shots (0,); expected numbers from 1
sweep ridge --train digits/val --on digits/test --shots 100000 | have fewer than 100000 rows; ask for fewer shots
sweep ridge --train digits/val --on digits/test --seeds x | invalid int value: 'x'
sweep ridge --train digits/val --on digits/test --metric best | 'best'; top1
3 sweep ridge --train digits/none --on digits/test | digits/none; similar
sweep --file missing.toml | missing.toml: cannot be read as a sweep
sweep --file bad.toml | bad.toml: cannot be read as a sweep; line 1
sweep --file unknown.toml | unknown key 'step'; expected some of; seeds
sweep --reproduce-paper wise | 'wise'; flyp
3 sweep ridge --data digits --models nosuch --train train | digits/test@nosuch; similar
sweep tip_adapter --train digits/val --on digits/test | tip_adapter needs a text store
table rigde --data digits --models tiny | unknown head 'rigde'; did you mean ridge?
table ridge | required: --data, --models
table ridge --data digits --models tiny | ridge fits from labelled rows; name them with --train
table ridge --data digits --format pdf | 'pdf'; latex
report | required: RESULTS
report missing.jsonl | missing.jsonl: cannot be read as results
report not.txt | not.txt: no row with a key; `featcache evaluate`
report empty.jsonl | empty.jsonl: no row
report rows.jsonl --metric best | best'; expected one of brier
report rows.jsonl --format pdf | 'pdf'; markdown
report rows.jsonl --heads nosuch | --heads nosuch: no such head; the files hold ridge
report rows.jsonl --on nosuch | no top1 on 'nosuch'; the rows hold digits
report rows.jsonl --against nosuch | --against nosuch: expected published
leaks digits/test | required: TEST
5 leaks digits/test other/test | features of encoder; encode both with one model
leaks digits/test digits/val --threshold 2 | threshold 2.0; a cosine from -1 to 1
leaks digits/test digits/val --per-row 0 | per_row 0; at least 1
demo --full --steps 0 | --steps: '0', expected a whole number from 1
demo --output x.png | --output x.png: is a file; name a folder
generate | required: -o/--out
generate three.txt --out made --images 0 | --images: '0', expected a whole number from 1
generate nosuch.txt --out made | 'nosuch.txt': no such file
finetune digits | required: -o/--out
finetune digitz --out run | unknown source 'digitz', did you mean 'digits'?
finetune digits --out run --steps 0 | --steps: '0', expected a whole number from 1
finetune digits --out run --steps 99999999999 | expected a whole number from 1 to 1,000,000,000
finetune digits --out run --steps 5 --epochs 2 | epochs 2 and steps 5: give one of the two
finetune digits --out run --steps 5 --lr -1 | --lr: '-1', expected a number above 0
finetune digits --out run --steps 5 --lr fast | --lr: 'fast', expected a number above 0
finetune digits --out run --recipe nosuch | recipe nosuch: expected one of; flyp; or a TOML file
finetune digits --out run --recipe bad.toml | bad.toml: cannot be read as TOML; expected NAME = VALUE
finetune digits --out run --recipe unknown.toml | unknown options step; expected some of
finetune digits --out run --steps 1 --regularizer nosuch=1 | regularizer 'nosuch': expected one of lipsum
finetune digits --out run --steps 1 --regularizer lipsum=x | weight 'x'; lipsum=1.0
finetune digits --out run --steps 1 --head missing.safetensors | 'missing.safetensors': no such file; expected zero_shot
finetune digits --out run --steps 1 --objective mse | 'mse'; contrastive
finetune digits --out run --steps 1 --schedule lipsum --warmup 5 | leave warmup out
finetune digits --out run --steps 1 --optimizer sgd | 'sgd'; adamw
finetune digits --out run --steps 1 --shots 0 | --shots: '0', expected a whole number from 1
finetune digits --out run --steps 1 --layer-decay 2 | --layer-decay: '2', expected a number above 0 and at most 1
finetune digits --out full --steps 1 | full exists and is not the folder of a run; name another --out
finetune digits --out run --steps 1 --train everything | --train: invalid choice: 'everything'; 'image', 'text'
finetune digits --out run --steps 1 --batch-size 0 | --batch-size: '0', expected a whole number from 1
finetune digits --out run --steps 1 --val digits:nosuch | no split 'nosuch'; expected one of train
finetune digits --out run --steps 1 --split nosuch | no split 'nosuch'
finetune digits --out run --steps 1 --betas 0.9 | --betas: expected 2 arguments
finetune digits --out run --steps 1 --label-smoothing 1.5 | --label-smoothing: '1.5'; a number from 0 to below 1
wise tiny missing.pt --out merged | missing.pt: no such file or folder; give a model folder
wise tiny tiny | required: -o/--output/--out
wise tiny --out merged | required: FINE_TUNED
wise tiny tiny --out merged --alpha half | invalid float value: 'half'
wise tiny tiny --out merged --soup best | 'best'; greedy
wise tiny tiny --out merged --fisher one | --fisher: expected 2 arguments
wise tiny tiny --out merged --on digits/test --select nosuch | 'digits/test': expected DATASET:SPLIT, as in digits:val
moments | required: DATASET:SPLIT
moments digits/none | 'digits/none': expected DATASET:SPLIT, as in digits:val
merge | required: METHOD, MODEL
merge nosuch tiny tiny --out m | merge 'nosuch': expected one of soup, wise
fisher digits:val | required: -o/--output
fisher digits:val -o f.safetensors --passes 0 | passes 0: expected a number from 1
fisher digits:nosuch -o f.safetensors | no split 'nosuch'
convert missing.pt out | missing.pt: no such checkpoint; give a safetensors or torch file
convert x.png out | x.png
convert ridge.safetensors | required: OUT
convert ridge.safetensors out --to onnx | 'onnx'; huggingface
convert not.txt out --base tiny | not.txt
"""


def rows() -> list[tuple[int, str, list[str]]]:
    """Exit code, command line and expected words of every mistake."""
    found = []
    for line in MISTAKES.strip().splitlines():
        command, _, words = line.partition(" | ")
        code, _, rest = command.partition(" ")
        code, command = (code, rest) if code.isdigit() else ("2", command)
        found.append((int(code), command, words.split("; ")))
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with stores, heads, results and files that are not what they seem."""
    folder, before = tmp_path_factory.mktemp("mistakes"), Path.cwd()
    os.chdir(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEATCACHE_ROOT", str(folder / "cache"))
        write_files()
        with contextlib.redirect_stdout(io.StringIO()):
            for words in (
                "encode digits --split test val --quiet",
                "text digits --templates digits --quiet",
                "fit ridge digits/val --set alphas=[1.0] -o ridge.safetensors",
                "fit knn digits/val --set n_neighbors=5 -o knn.safetensors",
                "fit zero_shot texts/digits -o zero_shot.safetensors",
                "evaluate ridge.safetensors --on digits/test --results rows.jsonl",
                "import other.npz --encoder-name other --name other --split test",
            ):
                assert main(words.split()) == 0, words
        yield folder
    os.chdir(before)


def listed() -> list[str]:
    """Content of the working directory, except for the folder of a run, which is made before the model is loaded."""
    return sorted(set(os.listdir()) - {"run"})


def write_files() -> None:
    """Files of the working directory."""
    for path in ("x.png", "pictures/a/1.png", "pictures/b/1.png"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path)
    for path, text in {
        "not.txt": "no such thing\n",
        "empty.txt": "",
        "three.txt": "ant\nbee\ncow\n",
        "plain.txt": "a photo\n",
        "bad.toml": "steps = = 3\n",
        "unknown.toml": "step = 3\n",
        "bad.json": '{"a": ',
        "table.csv": "file,klass\nx.png,a\n",
        "empty.jsonl": "",
        "full/a": "x",
    }.items():
        Path(path).parent.mkdir(exist_ok=True)
        Path(path).write_text(text)
    features = np.eye(6, 3, dtype=np.float32) + 0.1
    np.savez("other.npz", features=features, labels=np.arange(6) % 2)
    np.savez("short.npz", features=features, labels=np.arange(5))
    np.savez("nan.npz", features=np.where(np.arange(6)[:, None] == 2, np.nan, features), labels=np.arange(6))
    np.savez("nothing.npz", a=np.arange(3))


@pytest.mark.parametrize(("code", "command", "words"), rows(), ids=[command for _, command, _ in rows()])
def test_a_mistake_is_answered_in_one_line(
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    code: int,
    command: str,
    words: list[str],
) -> None:
    monkeypatch.setenv("FEATCACHE_ROOT", str(place / "cache"))
    capsys.readouterr()
    before = listed()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert main(shlex.split(command)) == code
    said = capsys.readouterr().err
    errors = [line for line in said.splitlines() if line.startswith("featcache: ") and ": warning: " not in line]
    assert len(errors) == 1, said
    assert "Traceback" not in said
    for part in words:
        assert part in errors[0]
    assert listed() == before  # nothing is begun


def test_every_verb_has_tested_mistakes() -> None:
    commands = [command for _, command, _ in rows()]
    assert len(commands) == len(set(commands)) >= 150
    assert set(VERBS) <= {command.split()[0] for command in commands}
