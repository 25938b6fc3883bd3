"""Fine-tune a LLaVA with StructLoRA, or with LoRA to compare.

    python train_llava.py                             the embedded demo: no downloads, CPU
    python train_llava.py --checkpoint llava-v1.5-7b --vision-checkpoint clip-vit-large-patch14-336
        --data vqav2 --images coco --gradient-checkpointing                         one GPU
    ... --method lora      ... --resume      ... --eval-only      ... --merge

--checkpoint reads LLaVA-1.5 as its authors publish it (pytorch_model-*.bin, config.json), with
CLIP's folder as --vision-checkpoint, and what --merge writes. --data: LLaVA's conversations, COCO's
captions, VQAv2's or OK-VQA's questions and annotations: a .json or a folder of them.
"""

import copy
import json
import math
import re
from collections import Counter, namedtuple
from dataclasses import asdict
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Iterator

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

import train_llama as llama
import train_vit as vit
from structlora import load_torch, reading

IMAGE_TOKEN = -200                   # stands for the picture among token ids, as in LLaVA
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# Tuned on the demo with seeds 100 to 105, not those reported; a checkpoint's is LLaVA's own.
LEARNING_RATES = {"lora": 2e-2, "lora4r": 5e-3, "structlora": 2e-2, "all": 1e-2, "checkpoint": 2e-4}
OPTIONS = {                          # beside those of all scripts: default, or a type; help
    "vision_checkpoint": (str, "CLIP's folder"), "tune_vision": (False, "adapt the tower too"),
    "images": (str, "folder of the pictures (that of --data)"),
    "tokenizer": (str, "its tokenizer.model (in the folder of --checkpoint)"),
    "test_examples": (2000, "examples to test on, at most"),
    "gradient_checkpointing": (False, "recompute blocks in the backward pass: less memory"),
    "tune_projector": (False, "train it too"), "out": ("out/llava", "folder for all results")}


# --- Model: module names are those of LLaVA's own code, so that exported adapters fit it

class ClipBlock(vit.Block):
    """The ViT's block with CLIP's quick GELU, x sigmoid(1.702 x); [N, T, D] -> [N, T, D]."""

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        hidden = self.fc1(self.norm2(x))
        return x + self.fc2(hidden * torch.sigmoid(1.702 * hidden))


class Tower(nn.Module):
    """CLIP's vision tower (Radford et al. 2021) up to the layer that LLaVA reads: normalised images
    [N, 3, S, S] -> features of the patches [N, P, D]; the class token's are dropped."""

    def __init__(self, config: vit.ViTConfig):
        super().__init__()
        c = self.config = config
        self.patch_embed = nn.Conv2d(3, c.width, c.patch_size, c.patch_size, bias=False)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, c.width))
        places = 1 + (c.image_size // c.patch_size) ** 2
        self.pos_embed = nn.Parameter(torch.zeros(1, places, c.width))
        self.norm_pre = nn.LayerNorm(c.width, c.eps)
        self.blocks = nn.ModuleList(ClipBlock(c) for _ in range(c.depth))

    def forward(self, images):
        x = self.patch_embed(images.to(self.patch_embed.weight.dtype)).flatten(2).mT   # [N, P, D]
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        x = self.norm_pre(x)                                                     # [N, 1 + P, D]
        for block in self.blocks:
            x = block(x)
        return x[:, 1:]


class Llava(llama.Llama):
    """LLaVA-1.5 (Liu et al. 2023), a LLaMA in which projected patches stand among the words: images
    [M, 3, S, S] and tokens [N, T] with M times IMAGE_TOKEN, row by row -> logits [N, T + P - 1, V]
    where each row has one picture of P patches. select [N, T] speaks of tokens."""

    def __init__(self, config: llama.LlamaConfig, vision: vit.ViTConfig):
        super().__init__(config)
        self.vision, self.model.vision_tower = vision, Tower(vision)
        self.sizes["vision"] = asdict(vision)
        self.model.mm_projector = nn.Sequential(
            nn.Linear(vision.width, config.dim), nn.GELU(), nn.Linear(config.dim, config.dim))

    def forward(self, images=None, tokens=None, embeddings=None, cache=None, select=None):
        # generate() gives a prompt as embeddings, and then tokens to what the cache holds.
        if embeddings is None and cache is None:
            embeddings, ends = self.splice(images, tokens)
            if select is not None:                               # where the token's last place is
                select = select.new_zeros(embeddings.shape[:2]).scatter(1, ends, select)
        return super().forward(tokens, embeddings, cache, select)

    def splice(self, images, tokens) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings [N, S, D], and the last place of each token in them [N, T]. Raises ValueError
        if pictures and IMAGE_TOKENs differ in number."""
        P, M = self.model.vision_tower.pos_embed.shape[1] - 1, 0 if images is None else len(images)
        places = torch.where(tokens == IMAGE_TOKEN, P, 1)        # that each token takes, [N, T]
        rows = [row.repeat_interleave(each) for row, each in zip(tokens, places)]
        tokens = pad_sequence(rows, batch_first=True)                            # [N, S]
        pictured = tokens == IMAGE_TOKEN
        if M * P != int(pictured.sum()):
            raise ValueError(f"{M} images for {pictured.sum() // P} image tokens ({IMAGE_TOKEN})")
        words = self.model.embed_tokens(tokens.masked_fill(pictured, 0))         # [N, S, D]
        if not M:    # a blank picture of which nothing is used, as in LLaVA's code: gradients reach
            images = words.new_zeros(1, 3, *[self.vision.image_size] * 2)        # the tower anyhow
        features = self.model.mm_projector(self.model.vision_tower(images))      # [M, P, D]
        x = words.masked_scatter(pictured[:, :, None], features.to(words.dtype))
        return x, places.cumsum(1) - 1


# --- Fine-tuning: llama.fine_tune is the loop, with LLaVA's batches and losses

def losses_of(model: nn.Module, batch: tuple) -> torch.Tensor:
    """Cross entropy of each answer token of a batch of collate(), [M] in nats, row by row."""
    images, *texts = batch
    return llama.answer_losses(partial(model, images), texts)


def main() -> None:
    """Data, backbone, then the runs of this command line, on the same examples."""
    args = vit.options(__doc__, **OPTIONS)
    if not args.tune_vision:         # where the language model's are called self_attn, its attn
        args.targets = re.sub(r"(?<![\w.])([qkvo]_proj)\b", r"self_attn.\1", args.targets)
    path, tokenizer, shots = args.checkpoint, Words(), args.shots
    runs, dtype = vit.trials(args, LEARNING_RATES), getattr(torch, args.dtype)
    if path:
        train, test = read_data(args.data, args.images)
        tokenizer = llama.load_tokenizer(args.tokenizer or Path(path, "tokenizer.model"))
        model = load_llava(path, args.vision_checkpoint, dtype, args.device)
        llama.check_vocabulary(model, tokenizer, path)
        print("pictures are padded to a square of {image_size} x {image_size} and normalised with "
              "mean {mean} and deviation {std}".format(**vars(model.vision)))
    else:
        model, shots = Llava(*SMALL), shots or (None if args.fraction else 200)
        train, test = (draw_examples(n, 10 * args.seed + n, True) for n in (1000, 300))
    train = [train[i] for i in vit.choose(torch.zeros(len(train)), shots, args.fraction, args.seed)]
    rows = [row for row in map(partial(encode, tokenizer), train) if True in row.answers]
    test = test[::math.ceil(len(test) / args.test_examples)]
    test = [e for e in test if True in encode(tokenizer, e).answers]     # not all question
    num_examples = sum(sum(row.answers) for row in rows)                 # predicted tokens
    vit.check_runs(model, runs, len(rows))
    model = model if path else pretrained(args).to(dtype)
    name, digest = vit.adapters_beside(model, args), vit.fingerprint(rows, test)
    score = vit.autocast(args)(partial(evaluate, tokenizer=tokenizer, test=test, args=args))
    table = [{"method": name} | score(model)]
    for name, out, config, lr in runs:
        fresh = model if path else copy.deepcopy(model)          # --merge and --tune change it
        table.append(llama.fine_tune(
            args, config, lr, fresh, rows, num_examples, score, name, out, digest,
            partial(collate, vision=model.vision), losses_of,
            [fresh.model.mm_projector] * args.tune_projector))
    vit.print_table(table)


# --- Checkpoints

# What CLIP's names become in ours, in this order.
CLIP = {"model.vision_tower.vision_tower.": "", "vision_model.": "", "encoder.layers.": "blocks.",
        "embeddings.class_embedding": "cls_token", "embeddings.patch_embedding": "patch_embed",
        "embeddings.position_embedding.weight": "pos_embed", "pre_layrnorm": "norm_pre",     # sic
        "layer_norm": "norm", "self_attn.": "attn.", "out_proj": "o_proj", "mlp.": ""}
# Its other tensors: the text's, and those behind the layer that LLaVA reads.
NOT_READ = re.compile(r"(?:text_model|text_projection|visual_projection|post_layernorm)\.|"
                      "logit_scale|embeddings.position_ids").search
# What LLaVA-1.5's config.json says of the pictures' way; other values mean another model.
SETTINGS = {"mm_projector_type": "mlp2x_gelu", "mm_vision_select_feature": "patch",
            "image_aspect_ratio": "pad", "mm_patch_merge_type": "flat"}
# The rest of its own keys: of its training. (The tower is the one that --vision-checkpoint names.)
PASSED = """mm_vision_tower mm_hidden_size mm_projector_lr use_mm_proj unfreeze_mm_vision_tower
    tune_mm_mlp_adapter max_length tokenizer_padding_side tokenizer_model_max_length""".split()
# What CLIP's two .json leave out is as here; they hold these keys, with the values that are given.
DEFAULTS = {"image_size": 224, "patch_size": 32, "hidden_size": 768, "num_hidden_layers": 12,
            "num_attention_heads": 12, "intermediate_size": 3072, "layer_norm_eps": 1e-5,
            "image_mean": CLIP_MEAN, "image_std": CLIP_STD}
TOWER = {"model_type": "clip_vision_model", "hidden_act": "quick_gelu", "num_channels": 3,
         "do_resize": True, "resample": 3, "do_rescale": True, "rescale_factor": 1 / 255,
         "do_normalize": True, "size": None, "crop_size": None} | dict.fromkeys(DEFAULTS)
BESIDE = (*vit.IGNORED, *"""projection_dim dropout attention_dropout initializer_factor id2label
    chunk_size_feed_forward tie_word_embeddings length_penalty repetition_penalty diversity_penalty
    encoder_no_repeat_ngram_size no_repeat_ngram_size min_length max_length num_beams top_k top_p
    num_beam_groups num_return_sequences typical_p temperature do_center_crop""".split())


def load_llava(llava_directory: str | Path, vision_directory: str | Path | None = None,
               dtype: torch.dtype = torch.bfloat16, device: str = "cpu") -> Llava:
    """Reads LLaVA-1.5 and CLIP's folder, or what --merge wrote and no other, in eval mode. A tower
    in LLaVA's own files goes before CLIP's. Raises ValueError that names them and what is wrong."""
    path = Path(llava_directory)
    with reading(path if path.is_file() else f"{path} with {vision_directory}"):
        config, parts = llama.read_checkpoint(path, ("mm_vision_select_layer", *SETTINGS, *PASSED))
        sizes = load_torch(path).get("vision") if path.is_file() else None
        if not sizes and (path.is_file() or not vision_directory):
            raise ValueError("a LLaMA without a tower: give LLaVA's, and --vision-checkpoint")
        vision = vit.ViTConfig(**sizes) if sizes else read_tower(
            path / "config.json", Path(vision_directory), parts)
        if max(config.num_layers, vision.depth) > len(parts):    # else they would all be built
            raise ValueError(f"{config.num_layers} and {vision.depth} layers: not in the files")
        with torch.device("meta"):
            model = Llava(config, vision)
        return llama.assemble(model, parts, dtype, device)


def read_tower(path: Path, folder: Path, parts: dict[str, list]) -> vit.ViTConfig:
    """Sizes of CLIP's tower in `folder`, up to the hidden state that LLaVA's config.json at `path`
    names (0 enters the first block; negative: from the end); its weights are added to `parts`.
    Raises ValueError for what the tower, or read_pixels() and vit.prepare(), do otherwise."""
    c, v, processor = vit.read_json(path), dict(DEFAULTS), folder / "preprocessor_config.json"
    vit.only(c, SETTINGS, tuple(c), f"this is no LLaVA-1.5: {path}:")
    for file in [folder / "config.json"] + [processor] * processor.exists():
        given = vit.read_json(file)
        given = given.get("vision_config", given)                # a whole CLIP has a text part too
        vit.only(given, TOWER, BESIDE, f"{file}:")
        v |= {key: value for key, value in given.items() if value is not None}
    size, depth = v["image_size"], v["num_hidden_layers"]
    with reading(processor):
        for sides in (v.get("size", size), v.get("crop_size", size)):        # or a dict of them
            if {*(sides.values() if isinstance(sides, dict) else [sides])} != {size}:
                raise ValueError(f"size {sides}, and the tower's pictures have {size}")
        torch.tensor([v["image_mean"], v["image_std"]]).view(2, 3)           # as many numbers
    layer = c.get("mm_vision_select_layer", -2)
    with reading(f"{path}: mm_vision_select_layer is {layer}, of {depth}"):
        used = range(depth + 1)[layer]
    tensors = {key: parts.pop(key)[0] for key in list(parts) if "vision_tower." in key}
    for file in [] if tensors else vit.weight_files(folder):
        tensors |= llama.read_state(file)
    t = vit.renamed({key: tensors[key] for key in tensors if not NOT_READ(key)}, CLIP)
    t["cls_token"], t["pos_embed"] = t["cls_token"].view(1, 1, -1), t["pos_embed"][None]
    parts |= {f"model.vision_tower.{name}": [tensor] for name, tensor in t.items()
              if not name.startswith("blocks.") or int(name.split(".")[1]) < used}
    return vit.ViTConfig(size, v["patch_size"], v["hidden_size"], used, v["num_attention_heads"],
                         v["intermediate_size"], eps=v["layer_norm_eps"],
                         mean=tuple(v["image_mean"]), std=tuple(v["image_std"]))


# --- Data

# image: name or Path of a file, uint8 pixels [3, S, S], or None. turns: [(question, answer)]; a
# picture opens the first question as "<image>\n". references: right answers to it. kind: "question"
# (scored by VQA accuracy) or "caption" (by CIDEr).
Example = namedtuple("Example", "image turns references kind")
Row = namedtuple("Row", "tokens answers image")    # token ids, which of them are answers, as above
MAX_LENGTH, NEW_TOKENS = 2048, 32    # tokens of a conversation (it loses its end), of an answer
# Vicuna v1's template, and what LLaVA-1.5 asks for short answers and for captions.
SYSTEM = ("A chat between a curious user and an artificial intelligence assistant. The assistant "
          "gives helpful, detailed, and polite answers to the user's questions. ")
SHORT = "\nAnswer the question using a single word or phrase."
CAPTION = "<image>\nProvide a one-sentence caption for the provided image."
# What stands in questions for pictures, films and sounds that are not read.
MEDIA = r"<\|?(?!image>)(?i:image|img|video|audio|speech|vision)\w*\|?>"
TEXTS = {"value", "question", "caption", "answer", "multiple_choice_answer", "file_name"}
# Keys of COCO's and VQA's files that are passed over.
FILE = ("info", "license", "licenses", "categories", "type", "task_type", "data_type")
NOTES = ("id", "image_id", "question_type", "answer_type", "confidence", "multiple_choice_answer")


def read_data(path: str | Path, images: str | Path | None = None) -> tuple[list, list]:
    """(training, test) examples of a file, or of those in a folder, of which *val*, *test*, *dev*
    are for testing; without these every tenth picture's are. Raises ValueError that names the file
    and the record, or the first missing picture."""
    path, tests = Path(path), []
    files = [*path.glob("[!.]*")] if path.is_dir() else [path]
    files = sorted(file for file in files if file.suffix.lower() == ".json")
    if not files:
        raise ValueError(f"{path}: expected a .json file or a folder of them")
    if path.is_dir():                # by whole words: latest_train2014.json is no test
        words = {file: set(re.split(r"[\W\d_]+", file.stem.lower())) for file in files}
        tests = [f for f in files if "train" not in words[f] and words[f] & {*vit.TEST}]
    images = Path(images or (path if path.is_dir() else path.parent))
    train, test = (find_pictures(read_examples(part), images)
                   for part in ([file for file in files if file not in tests], tests))
    if not tests:
        names = sorted({e.image for e in train if e.image})
        if len(names) < 2:
            raise ValueError(f"{path}: {len(names)} picture(s): none to hold out; add *val*.json")
        held = {*names[::10]}
        test = [e for e in train if e.image in held]
        train = [e for e in train if e.image not in held]
    if not test or not any(answer for e in train for _, answer in e.turns):
        raise ValueError(f"{path}: too few answers in {len(train)} training, {len(test)} test rows")
    test = list({(e.image, e.turns[0][0]): e for e in test}.values())    # one caption of a picture
    print(f"{len(train)} rows to train on, and {len(test)} to test on, of "
          f"{', '.join(file.name for file in tests) or 'every tenth picture'}")
    return train, test


def read_examples(files: list[Path]) -> list[Example]:
    """Examples of files: a list of LLaVA's conversations, or an object of COCO's or VQA's. VQA's
    answers may be in any of the files."""
    contents, answers, examples = {}, {}, []
    known = ("conversations", "images", "annotations", "questions", "data_subtype")
    for file in files:
        with reading(file):
            content = json.loads(file.read_text(encoding="utf-8-sig"))
            content = {"conversations": content} if isinstance(content, list) else content
            if not isinstance(content, dict) or not content.keys() & {*known}:
                raise ValueError("expected a list of LLaVA's conversations, or an object of COCO's "
                                 f"captions, VQA's questions or annotations: {content!r:.60}")
            vit.only(content, known, FILE, "COCO's or VQA's object:")
            contents[file] = content
    for file in sorted(files, key=lambda file: "questions" in contents[file]):   # after the answers
        with reading(file):
            examples += parse(contents[file], answers)
    return examples


def fields(record: Any, names: str, more: tuple = ()) -> list:
    """The values of the keys `names` of a record, which may have `more` and no others. Under those
    of TEXTS anything but text is refused."""
    known = tuple(names.split())
    if not isinstance(record, dict) or not record.keys() >= {*known}:
        raise ValueError(f"expected a record of {' and '.join(known)}, found {record!r:.60}")
    vit.only(record, known, more)
    for name in TEXTS & record.keys():
        if not isinstance(record[name], str):
            raise ValueError(f"{name}: expected text, found {record[name]!r:.60}")
    return [record[name] for name in known]


def parse(content: dict, answers: dict) -> Iterator[Example]:
    """LLaVA's conversations; VQA's questions that have an answer; COCO's captions, each with all
    those of its picture as references; VQA's annotations go into `answers`, by question_id: the
    answer, and those of all people. What else COCO's files hold is passed over."""
    for number, record in enumerate(content.get("conversations", ()), 1):
        with reading(f"record {number}"):
            yield parse_conversation(record)
    for question in content.get("questions", ()):
        number, picture, text = fields(question, "question_id image_id question")
        if number in answers:
            name = f"COCO_{content['data_subtype']}_{picture:012d}.jpg"
            answer, people = answers[number]
            yield Example(name, [(f"<image>\n{text}{SHORT}", answer)], people, "question")
    names = dict(fields(p, "id file_name", tuple(p)) for p in content.get("images", ()))
    captions = {}
    for a in content.get("annotations", ()):
        if "question_id" in a.keys():                            # keys(): refuses what is no record
            number, given = fields(a, "question_id answers", NOTES)
            people = [fields(person, "answer", tuple(person))[0] for person in given]
            most = max(people, key=people.count)                 # OK-VQA's leave it to the reader
            answers[number] = a.get("multiple_choice_answer") or most, people
        elif not a.keys() & {"bbox", "segments_info"}:           # COCO's boxes
            picture, text = fields(a, "image_id caption", NOTES)
            captions.setdefault(names[picture], []).append(text.strip())
    for name, texts in captions.items():
        yield from (Example(name, [(CAPTION, text)], texts, "caption") for text in texts)


def parse_conversation(record: Any) -> Example:
    """{"image": file, "conversations": [{"from": "human" or "gpt", "value": text}]}; the picture
    goes before the text of the first question, as in LLaVA's own training."""
    turns, = fields(record, "conversations", ("image", "width", "height", *llama.BOOKKEEPING))
    roles, texts = map(list, zip(*[fields(turn, "from value") for turn in turns]))
    pictures, image = [text.count("<image>") for text in texts], record.get("image") or ""
    if (roles != ["human", "gpt"] * (len(turns) // 2)
            or pictures != [bool(image)] + [0] * len(texts[1:])):
        raise ValueError("expected human and gpt in turn, <image> once in the first if it has one; "
                         f"found {roles!r:.60} and <image> {sum(pictures)} times")
    asked = "\n".join(texts[::2])    # without a picture it may be HTML, which has such tags too
    media = re.search(MEDIA if image else rf"(?m)^{MEDIA}|{MEDIA}$", asked)
    if media and (image or "</" not in asked):
        raise ValueError(f"{media[0]}: of pictures, films and sounds only <image> is read")
    if Path(image).suffix.lower() not in ("", *vit.PICTURES):
        raise ValueError(f"{image!r:.60} is no picture of a kind that is read")
    if image:
        texts[0] = f"<image>\n{texts[0].replace('<image>', '').strip()}".strip()
    return Example(image or None, list(zip(texts[::2], texts[1::2])), [texts[1]] * 10,
                   "question" if len(texts[1].split()) <= 4 else "caption")


def find_pictures(examples: list[Example], folder: Path) -> list[Example]:
    """The examples with the paths of their pictures, in the folder or in one of those in it."""
    folders, paths = [folder, *sorted(d for d in folder.glob("[!.]*") if d.is_dir())], {None: None}
    for name in sorted({e.image for e in examples if e.image is not None}):
        paths[name] = next((d / name for d in folders if (d / name).is_file()), None)
        if paths[name] is None:
            raise ValueError(f"{folder}: has no {name[:99]}; --images names the pictures' folder")
    return [e._replace(image=paths[e.image]) for e in examples]


@lru_cache(maxsize=2048)             # 0.7 GB of 336 x 336
def read_pixels(path: Path, size: int, mean: tuple) -> torch.Tensor:
    """uint8 [3, size, size] of a file: padded to a square with the mean colour, then resized."""
    x = torch.from_numpy(vit.read_picture(path)).permute(2, 0, 1)
    H, W = x.shape[1:]
    side, top, left = max(H, W), max(W - H, 0) // 2, max(H - W, 0) // 2
    square = torch.tensor([[[int(255 * value)]] for value in mean]).byte().repeat(1, side, side)
    square[:, top:top + H, left:left + W] = x
    return F.interpolate(square[None], (size, size), mode="bicubic", antialias=True)[0]


def encode(tokenizer: Any, example: Example) -> Row:
    """A conversation in Vicuna's template, as LLaVA-1.5 tokenises it: each round, and the text on
    either side of a picture, by itself. With no question, the picture alone: its first stage."""
    def ids(text: str) -> list[int]:
        first, *rest = [tokenizer.encode(part, bos=False) for part in text.split("<image>")]
        return sum(([IMAGE_TOKEN, *part] for part in rest), first)

    tokens, answers, system = [tokenizer.bos_id], [False], SYSTEM
    for question, answer in example.turns:
        prompt = "<image>" if question is None else f"{system}USER: {question} ASSISTANT:"
        head, both = ids(prompt), ids(f"{prompt} {answer}") + [tokenizer.eos_id]
        tokens, system = tokens + both, ""                       # it opens the first round
        answers += [place >= len(head) for place in range(len(both))]
    return Row(tokens[:MAX_LENGTH], answers[:MAX_LENGTH], example.image)


def collate(rows: list[Row], device: str, vision: vit.ViTConfig) -> tuple:
    """Normalised images [M, 3, S, S] of the rows that have one, or None, token ids [N, T], zero on
    the right of short rows, and which of them are answers [N, T]."""
    tokens = pad_sequence([torch.tensor(row.tokens) for row in rows], batch_first=True)
    answers = pad_sequence([torch.tensor(row.answers) for row in rows], batch_first=True)
    pixels = [read_pixels(row.image, vision.image_size, vision.mean)
              if isinstance(row.image, Path) else row.image for row in rows
              if row.image is not None]
    images = vit.prepare(torch.stack(pixels).to(device), vision) if pixels else None
    return images, tokens.to(device), answers.to(device)


# --- Scores

NUMBERS = {word: str(n) for n, word in enumerate(
    "zero one two three four five six seven eight nine ten".split())} | {"none": "0"}
# VQA's contractions. An answer that lacks one apostrophe of such a word gets it back.
CONTRACTIONS = """ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't
hadn't've hasn't haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am
mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't
she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd
there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've
weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's
who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd
you'd've you'll you're you've""".split()
REPAIRED = {word[:i] + word[i + 1:]: word for word in CONTRACTIONS for i in range(len(word))
            if word[i] == "'"} | {"somebody'd": "somebodyd"}     # sic: the official table's slip


def normalise(text: str) -> str:
    """An answer as VQA's official evaluation compares it: without punctuation and articles,
    numbers to ten as digits. normalise("The two dogs.") -> "2 dogs" """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    result, grouped = text, re.search(r"\d,\d", text)            # 1,000
    for mark in ";/[]\"{}()=+\\_-><@`,?!":
        inside = f"{mark} " not in text and f" {mark}" not in text and not grouped
        result = result.replace(mark, " " if inside else "")
    result = re.sub(r"\.(?!\d)", "", result, count=32)           # 32 by a slip of the original
    words = [NUMBERS.get(word, word) for word in result.lower().split()]
    return " ".join(REPAIRED.get(word, word) for word in words if word not in ("a", "an", "the"))


def vqa_accuracy(answer: str, references: list[str]) -> float:
    """VQA accuracy v2 (Antol et al. 2015): min(1, agreeing / 3), a mean over leaving out each
    reference in turn. Both sides are normalised, as LLaVA does before it submits; the official
    script leaves equal references as they are. Raises ValueError without any."""
    said, wanted = normalise(answer), [normalise(reference) for reference in references]
    if not wanted:
        raise ValueError("vqa_accuracy needs at least one reference")
    agree = wanted.count(said)
    return sum(min(1, (agree - (other == said)) / 3) for other in wanted) / len(wanted)


def grams(text: str) -> Counter:
    """How often each n-gram of 1 to 4 words occurs."""
    words = text.split()
    return Counter(tuple(words[i:i + n]) for n in range(1, 5) for i in range(len(words) - n + 1))


def cider(candidates: list[str], references: list[list[str]]) -> float:
    """CIDEr-D (Vedantam et al. 2015) as pycocoevalcap computes it, from 0 to 10: the mean over
    candidates and their references of 10 similarity(). Raises ValueError where it has none."""
    if len(candidates) != len(references) or not candidates or not all(references):
        raise ValueError("cider needs candidates, and references for each of them")
    wanted = [[*map(grams, texts)] for texts in references]
    frequency = Counter(gram for counts in wanted for gram in set().union(*counts))
    total = 0.0
    for text, texts in zip(candidates, wanted):
        each = [similarity(grams(text), counts, frequency, len(wanted)) for counts in texts]
        total += 10 * sum(each) / len(each)
    return total / len(wanted)


def similarity(a: Counter, b: Counter, frequency: Counter, pictures: int) -> float:
    """Mean over n = 1 to 4 of the cosine of the n-grams' tf-idf vectors, a's clipped to b's, times
    a Gaussian of the difference in 2-grams. frequency: how many of the `pictures` have each."""
    def tf_idf(counts: Counter, n: int) -> dict:
        return {g: k * (math.log(pictures) - math.log(max(1, frequency[g])))
                for g, k in counts.items() if len(g) == n}

    total = 0.0
    for n in range(1, 5):
        v, w = tf_idf(a, n), tf_idf(b, n)
        dot = sum(min(v[g], w[g]) * w[g] for g in v if g in w)   # not over a set: the same order
        total += dot / (math.hypot(*v.values()) * math.hypot(*w.values()) or 1)
    longer = sum(k for g, k in a.items() if len(g) == 2)
    longer -= sum(k for g, k in b.items() if len(g) == 2)
    return total / 4 * math.exp(-longer ** 2 / (2 * 6 ** 2))


def plain(text: str) -> str:
    """Lower-case words without punctuation, nearly what COCO's tokenizer leaves."""
    return " ".join(re.findall(r"[\w'-]+", text.lower()))


def answer(model: Llava, tokenizer: Any, images, prompts: torch.Tensor) -> list[str]:
    """What the model says to prompts of one length, [N, T], greedily."""
    embeddings, _ = model.splice(images, prompts)                # [N, S, D]
    prompts = prompts.new_zeros(embeddings.shape[:2])            # only their number counts now
    out = llama.generate(model, prompts, NEW_TOKENS, eos_id=tokenizer.eos_id, embeddings=embeddings)
    return [tokenizer.decode(ids).strip() for ids in out[:, prompts.shape[1]:].tolist()]


@torch.no_grad()
def evaluate(model: Llava, tokenizer: Any, test: list[Example], args) -> dict[str, float]:
    """accuracy: VQA accuracy of the first questions; cider: CIDEr of the captions; loss: nats per
    token of the right answers. Prints two answers."""
    rows, groups, texts, losses = [encode(tokenizer, e) for e in test], {}, {}, []
    for i, row in enumerate(rows):           # prompts of one length, so that none needs padding
        groups.setdefault((row.answers.index(True), row.image is None), []).append(i)
    for (start, _), group in groups.items():
        for part in torch.tensor(group).split(2 * args.batch_size):
            batch = collate([rows[i] for i in part], args.device, model.vision)
            losses.append(losses_of(model.eval(), batch).cpu())
            texts |= zip(part.tolist(), answer(model, tokenizer, batch[0], batch[1][:, :start]))
    texts = [texts[i] for i in range(len(rows))]
    for e, text in zip(test[:2], texts):
        print(f"{e.turns[0][0][:90]!r} -> {text!r}; right: {e.references[0]!r}")
    right = [vqa_accuracy(t, e.references) for t, e in zip(texts, test) if e.kind == "question"]
    told = [(plain(text), [*map(plain, e.references)])
            for text, e in zip(texts, test) if e.kind == "caption"]
    scores = {"accuracy": sum(right) / len(right)} if right else {}
    scores |= {"cider": cider(*zip(*told))} if told else {}
    return scores | {"loss": float(torch.cat(losses).mean())}


# --- Demo: scenes that the script draws itself

COLOURS = {"red": (220, 40, 40), "green": (40, 190, 60), "blue": (50, 80, 230),
           "yellow": (230, 210, 40), "white": (235, 235, 235), "purple": (160, 60, 200)}
SHAPES = ("circle", "square", "triangle", "cross")
SMALL = (llama.LlamaConfig(100, 64, 4, 4, 4, 16, 168), vit.ViTConfig(
    32, 8, width=64, depth=3, heads=4, mlp=128, mean=CLIP_MEAN, std=CLIP_STD))


class Words:
    """A token for each word and mark that the demo writes."""
    split = re.compile(r"\w+|[^\w\s]|\n").findall
    words = sorted({*split(f"{SYSTEM}USER: ASSISTANT:{SHORT} What is on the left? right"), *COLOURS,
                    *SHAPES})
    bos_id, eos_id, vocab_size = 98, 99, 100

    def encode(self, text: str, bos: bool = True) -> list[int]:
        return [self.bos_id] * bos + [self.words.index(word) for word in Words.split(text)]

    def decode(self, ids: list[int]) -> str:
        return " ".join(self.words[i] for i in ids if i < len(self.words))


def draw_examples(count: int, seed: int, asked: bool) -> list[Example]:
    """`count` scenes [3, 32, 32] of two shapes, each with a question about one side. Not asked, for
    pretraining, it is one word, or none as in LLaVA's first stage: the text tells of both sides."""
    rng, examples = np.random.default_rng(seed), []
    y, x = np.mgrid[:32, :32]
    for _ in range(count):
        colours, shapes = rng.permutation(list(COLOURS))[:2], rng.permutation(SHAPES)[:2]
        pixels = rng.integers(0, 50, (32, 32, 3)).astype(np.uint8)
        for centre, colour, shape in zip((8, 24), colours, shapes):          # left, right
            radius = rng.uniform(5, 7)
            u = (x - centre - rng.uniform(-1, 1)) / radius       # the shape's own axes
            v = (y - 16 - rng.uniform(-3, 3)) / radius
            a, b = np.abs(u), np.abs(v)
            inside = {"circle": np.hypot(u, v) < 1, "square": np.maximum(a, b) < .85,
                      "triangle": (v < .8) & (2 * a < v + 1),
                      "cross": (np.minimum(a, b) < .3) & (np.maximum(a, b) < 1)}[shape]
            pixels[inside] = np.clip(rng.normal(COLOURS[colour], 12), 0, 255)
        sides = [*zip(("left", "right"), map(" ".join, zip(colours, shapes)))]
        (side, text), (other, rest) = sides[::rng.choice([1, -1])]
        question = f"<image>\nWhat is on the {side}?{SHORT}" if asked else f"<image>\n{side}"
        if not asked and rng.integers(4):
            question, text = None, f"{side} {text} {other} {rest}"
        image = torch.from_numpy(pixels).permute(2, 0, 1)
        examples.append(Example(image, [(question, text)], [text] * 10, "question"))
    return examples


def pretrained(args, steps: int = 600) -> Llava:
    """A small LLaVA pretrained on such scenes, always the same for a seed."""
    torch.manual_seed(args.seed)
    model = Llava(*SMALL).to(args.device)
    for name, weight in model.named_parameters():        # narrow ones learn little from the default
        if weight.dim() == 2:
            last = name.endswith(("o_proj.weight", "down_proj.weight", "fc2.weight"))
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5 * (0.35 if last else 1))
    nn.init.normal_(model.model.embed_tokens.weight, std=0.5)
    rows = [encode(Words(), e) for e in draw_examples(6000, 10 * args.seed, False)]

    def loss(step: int) -> torch.Tensor:
        batch = llama.rows_of_batch(rows, 32, step, args.seed)
        return losses_of(model, collate(batch, args.device, model.vision)).mean()

    vit.pretrain(model, loss, steps, lr=2e-3)
    return model


if __name__ == "__main__":
    raise SystemExit(vit.exit_status(main))
