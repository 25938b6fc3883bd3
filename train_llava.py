"""Fine-tune a LLaVA with StructLoRA, or with LoRA to compare.

    python train_llava.py                                 the embedded demo: no downloads, CPU
    python train_llava.py --data cifar-10-batches-bin     pretrain on captions of these pictures,
                                                          adapt to questions about them
    python train_llava.py --checkpoint llava-v1.5-7b --vision-checkpoint clip-vit-large-patch14-336
        --data vqav2 --images coco --gradient-checkpointing
                                                          the real thing, on one GPU
    ... --method lora                                     the baseline, same data and seed
    ... --tune-projector, --tune-vision                   train the projector too, adapt the tower
    ... --out out/llava --resume                          go on after a kill
    ... --eval-only                                       score the checkpoint and OUT/adapter.pt

--checkpoint reads LLaVA-1.5 as its authors publish it (pytorch_model-*.bin, config.json), any
LLaMA folder with --projector mm_projector.bin, and what --merge writes; --vision-checkpoint CLIP's
folder (pytorch_model.bin, config.json). --data reads LLaVA's instruction .json, COCO captions,
VQAv2 questions and annotations: a file, or a folder of *train*.json and *val*.json (*test*, *dev*);
--images is the folder that their names are looked up in. Pictures: .ppm, .npy (uint8 [H, W, 3]),
and through Pillow all others.

Order of this file: model, checkpoints, data, generation and metrics, demo, main.
"""

import functools
import json
import math
import re
import tokenize
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import structlora
import train_llama as llama
import train_vit as vit
from structlora import InputError, Task

IMAGE_TOKEN = -200                   # stands for the picture among token ids, as in LLaVA
CLIP_MEAN, CLIP_STD = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
# Tuned on the demo with seeds 100 to 102, apart from those reported; a checkpoint's is that of
# LLaVA's own LoRA, untuned.
LEARNING_RATES = {"lora": 2e-2, "lora matched": 2e-2, "structlora": 2e-2, "checkpoint": 2e-4}


# ---------------------------------------------------------------------------------------------
# Model: module names are those of LLaVA's own code, so that exported adapters fit it


class ClipBlock(vit.Block):
    """The ViT's block with CLIP's quick GELU, x sigmoid(1.702 x); [N, T, D] -> [N, T, D]."""

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        hidden = self.fc1(self.norm2(x))
        return x + self.fc2(hidden * torch.sigmoid(1.702 * hidden))


class Tower(nn.Module):
    """CLIP's vision tower (Radford et al. 2021) up to the layer that LLaVA reads.

    Normalised images [N, 3, S, S] -> features of the patches [N, P, D], class token dropped.
    """

    def __init__(self, config: vit.ViTConfig):
        super().__init__()
        c = self.config = config
        self.patches = (c.image_size // c.patch_size) ** 2
        self.patch_embed = nn.Conv2d(3, c.width, c.patch_size, c.patch_size, bias=False)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, c.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.patches, c.width))
        self.norm_pre = nn.LayerNorm(c.width, c.eps)
        self.blocks = nn.ModuleList(ClipBlock(c) for _ in range(c.depth))

    def forward(self, images):
        S = self.config.image_size
        if images.dim() != 4 or images.shape[1:] != (3, S, S):
            raise InputError(f"images are {list(images.shape)}, expected [N, 3, {S}, {S}]")
        x = self.patch_embed(images.to(self.patch_embed.weight.dtype)).flatten(2).mT   # [N, P, D]
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        x = self.norm_pre(x)                                                     # [N, 1 + P, D]
        for block in self.blocks:
            x = block(x)
        return x[:, 1:]


class Llava(llama.Llama):
    """LLaVA-1.5 (Liu et al. 2023): a LLaMA in which projected patches stand among the words.

    images [M, 3, S, S] and tokens [N, T] with M times IMAGE_TOKEN (row by row) -> logits
    [N, T + P - 1, V] where a row has one picture of P patches; shorter rows are padded on the
    right.
    """

    def __init__(self, config: llama.LlamaConfig, vision: vit.ViTConfig, pad: bool = True):
        super().__init__(config)
        self.view = vision, pad      # how pictures are seen: padded to a square, or cropped
        self.model.vision_tower = Tower(vision)
        self.model.mm_projector = nn.Sequential(
            nn.Linear(vision.width, config.dim), nn.GELU(), nn.Linear(config.dim, config.dim))

    def forward(self, images=None, tokens=None, embeddings=None, real=None, cache=None,
                select=None):
        """Logits; select [N, T] bool and real [N, T] bool speak of tokens, as in Llama.forward.

        Raises InputError if pictures and IMAGE_TOKENs differ in number. generate() gives the
        prompt as embeddings, and then tokens without pictures to what the cache holds."""
        if embeddings is None and cache is None:
            embeddings, ends, real = self.splice(images, tokens, real)
            if select is not None:                               # where the token's last place is
                N, S, _ = embeddings.shape
                select = select.new_zeros(N, S).scatter(1, ends, select)
        return super().forward(tokens, embeddings, real, cache, select)

    def splice(self, images, tokens, real=None) -> tuple:
        """Embeddings [N, S, D], the last place of each token in them [N, T], and real [N, S].

        real [N, T] bool is False at padding on the left; without it rows are padded on the right,
        where nobody looks, and the result has none either."""
        pictured = tokens == IMAGE_TOKEN
        if (M := 0 if images is None else len(images)) != (count := int(pictured.sum())):
            raise InputError(f"{M} images for {count} image tokens (id {IMAGE_TOKEN})")
        P, (N, T) = self.model.vision_tower.patches, tokens.shape
        ends = torch.where(pictured, P, 1).cumsum(1) - 1                         # [N, T]
        S = int(ends.max()) + 1
        if real is not None:
            ends = ends + S - 1 - ends[:, -1:]                   # rows end together
        row = torch.arange(N, device=tokens.device)[:, None].expand(N, T)
        words = self.model.embed_tokens(tokens.masked_fill(pictured, 0))         # [N, T, D]
        x = words.new_zeros(N, S, words.shape[2])
        x[row[~pictured], ends[~pictured]] = words[~pictured]
        span = ends[pictured][:, None] - torch.arange(P - 1, -1, -1, device=tokens.device)  # [M, P]
        if M:
            features = self.model.mm_projector(self.model.vision_tower(images))  # [M, P, D]
            x[row[pictured][:, None], span] = features.to(x.dtype)
        if real is not None:
            real = real.new_zeros(N, S).scatter(1, ends, real)
            real[row[pictured][:, None], span] = True
        return x, ends, real

    def initialise(self) -> "Llava":
        """Fresh weights for pretraining."""
        nn.init.normal_(self.model.vision_tower.pos_embed, std=0.1)
        return super().initialise()


# ---------------------------------------------------------------------------------------------
# Checkpoints


CLIP = {"embeddings.class_embedding": "cls_token", "embeddings.patch_embedding.weight":
        "patch_embed.weight", "embeddings.position_embedding.weight": "pos_embed",
        **vit.with_suffixes({
    "pre_layrnorm": "norm_pre", "post_layernorm": "unused",      # sic: CLIP's own spelling
    "encoder.layers.*.layer_norm1": "blocks.*.norm1",
    "encoder.layers.*.layer_norm2": "blocks.*.norm2",
    "encoder.layers.*.self_attn.q_proj": "blocks.*.attn.q_proj",
    "encoder.layers.*.self_attn.k_proj": "blocks.*.attn.k_proj",
    "encoder.layers.*.self_attn.v_proj": "blocks.*.attn.v_proj",
    "encoder.layers.*.self_attn.out_proj": "blocks.*.attn.o_proj",
    "encoder.layers.*.mlp.fc1": "blocks.*.fc1", "encoder.layers.*.mlp.fc2": "blocks.*.fc2"})}
INSIDE = "model.vision_tower.vision_tower."          # where LLaVA keeps a tower it has trained
# What LLaVA's config.json may say of the pictures' way; first what LLaVA-1.5 says.
SETTINGS = {"mm_projector_type": ("mlp2x_gelu",), "mm_vision_select_feature": ("patch",),
            "mm_use_im_start_end": (False,), "mm_use_im_patch_token": (False,),
            "image_aspect_ratio": ("pad", "square", None)}


def load_llava(llava_directory: str | Path, vision_directory: str | Path | None = None,
               dtype: torch.dtype = torch.bfloat16, device: str = "cpu",
               projector: str | Path | None = None) -> Llava:
    """Reads a LLaVA-1.5, or what --merge wrote, in eval mode.

    The tower comes from the LLaVA files if they hold one, else from vision_directory; the
    projector from the file `projector` (mm_projector.bin) if given. Raises InputError that names
    the file and what to do.
    """
    directory = Path(llava_directory)
    config, parts = llama.read_checkpoint(directory)
    if directory.is_file():
        vision, pad = merged_settings(directory)
    else:
        settings = read_settings(directory)
        pad = settings["image_aspect_ratio"] == "pad"
        inside = {key.removeprefix(INSIDE): parts.pop(key) for key in list(parts)
                  if key.startswith(INSIDE)}
        vision, tower = read_tower(directory, inside, vision_directory,
                                   settings["mm_vision_select_layer"])
        parts |= tower
    if projector:
        parts |= read_projector(Path(projector))
    with torch.device("meta"):
        model = Llava(config, vision, pad)
    return llama.assemble(model, directory, parts, dtype, device)


def read_settings(directory: Path) -> dict:
    """config.json of LLaVA (a plain LLaMA's says nothing of pictures: LLaVA-1.5's values)."""
    path = directory / "config.json"
    said = structlora.read_json(path) if path.exists() else {}
    for key, allowed in SETTINGS.items():
        if said.setdefault(key, allowed[0]) not in allowed:
            raise InputError(f"{path}: {key} = {said[key]!r} is not supported; only "
                             f"{' or '.join(map(repr, allowed))} is: this is no LLaVA-1.5")
    if type(layer := said.setdefault("mm_vision_select_layer", -2)) is not int:
        raise InputError(f"{path}: mm_vision_select_layer = {layer!r}: no number of a layer")
    return said


def read_tower(directory: Path, inside: dict, folder: str | Path | None,
               select_layer: int) -> tuple[vit.ViTConfig, dict]:
    """(sizes, parts by our names) of the tower; layers after `select_layer` are left out.

    inside: parts that LLaVA's files hold. folder: CLIP's; its config.json is read in either
    case."""
    if not inside and not folder:
        raise InputError(f"{directory}: holds no vision tower; name CLIP's folder with "
                         "--vision-checkpoint")
    said, path = read_clip_config(Path(folder) / "config.json") if folder else {}, directory
    if not inside:
        path = Path(folder) / "pytorch_model.bin"
        if not path.exists():
            structlora.refuse_safetensors(path.parent)
        inside = {key: llama.Part([path], [t]) for key, t in llama.read_state(path).items()}
    parts = structlora.rename(path, {key.removeprefix("vision_model."): part for key, part
                              in inside.items() if key.startswith("vision_model.")
                              and not key.endswith("position_ids")}, CLIP)
    tensors = {name: part.tensors[0] for name, part in parts.items()}
    tensors |= {name: tensors[name].reshape(1, -1, tensors[name].shape[-1])
                for name in ("cls_token", "pos_embed") if name in tensors and tensors[name].dim()}
    config = vit.sizes_of(path, tensors, said.get("num_attention_heads"), mean=CLIP_MEAN,
                          std=CLIP_STD, eps=said.get("layer_norm_eps", 1e-5))
    if (layers := said.get("num_hidden_layers", config.depth)) != config.depth:
        raise InputError(f"{path}: has {config.depth} of the {layers} layers in config.json")
    if not isinstance(config.heads, int) or config.heads < 1 or config.width % config.heads:
        raise InputError(f"{path}: width {config.width} does not divide into {config.heads} heads")
    used = layers + 1 + select_layer if select_layer < 0 else select_layer
    if not 0 < used <= layers:
        raise InputError(f"{directory}: mm_vision_select_layer = {select_layer}, but {path} has "
                         f"{layers} layers")
    kept = {f"model.vision_tower.{name}": llama.Part(part.paths, [tensors[name]])
            for name, part in parts.items() if not name.startswith("unused")
            and not (name.startswith("blocks.") and int(name.split(".")[1]) >= used)}
    config = replace(config, depth=used)
    with torch.device("meta"):
        expected = Tower(config).state_dict()
    for name in expected.keys() - {key.removeprefix("model.vision_tower.") for key in kept}:
        raise InputError(f"{path}: no weights for model.vision_tower.{name}: incomplete, or of "
                         "another model")
    return config, kept


def read_clip_config(path: Path) -> dict:
    """The vision part of CLIP's config.json, with what it leaves to CLIP's defaults."""
    said = structlora.read_json(path)
    if not isinstance(vision := said.get("vision_config", said), dict):
        raise InputError(f"{path}: vision_config is no object of sizes")
    said = {"num_hidden_layers": 12, "num_attention_heads": 12, "layer_norm_eps": 1e-5,
            "hidden_act": "quick_gelu"} | vision
    if not isinstance(said["layer_norm_eps"], float):
        raise InputError(f"{path}: layer_norm_eps = {said['layer_norm_eps']!r}: no number")
    if said["hidden_act"] != "quick_gelu":
        raise InputError(f"{path}: hidden_act = {said['hidden_act']!r}: only CLIP's quick_gelu is "
                         "supported")
    return said


def read_projector(path: Path) -> dict[str, llama.Part]:
    """mm_projector.bin of LLaVA's pretraining."""
    state = llama.read_state(path)
    if strange := [key for key in state if "mm_projector." not in key]:
        raise InputError(f"{path}: {strange[0]} is no part of a projector (mm_projector.*)")
    return {f"model.mm_projector.{key.rpartition('mm_projector.')[2]}": llama.Part([path], [tensor])
            for key, tensor in state.items()}


def merged_settings(path: Path) -> tuple[vit.ViTConfig, bool]:
    """What save_merged adds to a LLaMA's file: the tower's sizes, and if pictures are padded."""
    file = structlora.read_torch(path)
    try:
        return vit.ViTConfig(**file["vision"]), bool(file["pad"])
    except (KeyError, TypeError) as error:
        raise InputError(f"{path}: holds no LLaVA ({structlora.one_line(error)})") from None


def save_merged(model: Llava, path: Path) -> None:
    """Writes what --merge promises; load_llava reads it."""
    vision, pad = model.view
    llama.save_merged(model, path, vision=asdict(vision), pad=pad)


def save_llava(model: Llava, folder: Path, **more) -> None:
    """Writes FOLDER/llava in LLaVA-1.5's layout and FOLDER/clip in CLIP's; the reverse of the
    readers, for the demo and the tests. `more` goes into LLaVA's config.json."""
    c, (v, pad) = model.config, model.view
    own = "model.vision_tower."
    state = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    tower = {key.removeprefix(own): state.pop(key) for key in list(state) if key.startswith(own)}
    tower = structlora.rename(folder, tower, {ours: theirs for theirs, ours in CLIP.items()})
    tower["embeddings.class_embedding"] = tower["embeddings.class_embedding"].flatten()
    tower["embeddings.position_embedding.weight"] = tower["embeddings.position_embedding.weight"][0]
    name = "pytorch_model-00001-of-00001.bin"
    said = {"model_type": "llava_llama", "vocab_size": c.vocab_size, "hidden_size": c.dim,
            "num_hidden_layers": c.num_layers, "num_attention_heads": c.num_heads,
            "num_key_value_heads": c.num_kv_heads, "head_dim": c.head_dim, "rope_theta":
            c.rope_theta, "intermediate_size": c.hidden_dim, "rms_norm_eps": c.norm_eps,
            "mm_projector_type": "mlp2x_gelu", "mm_hidden_size": v.width,
            "mm_vision_select_layer": -1, "image_aspect_ratio": "pad" if pad else "square"}
    clip = {"vision_config": {
        "image_size": v.image_size, "patch_size": v.patch_size, "hidden_size": v.width,
        "num_hidden_layers": v.depth, "num_attention_heads": v.heads, "intermediate_size": v.mlp,
        "layer_norm_eps": v.eps, "hidden_act": "quick_gelu"}}
    for part, config, file, tensors in (
            ("clip", clip, "pytorch_model.bin", {f"vision_model.{k}": t for k, t in tower.items()}),
            ("llava", said | more, name, state)):
        (folder / part).mkdir(parents=True, exist_ok=True)
        structlora.write_atomically(folder / part / file, lambda t: torch.save(tensors, t))
        structlora.write_json(folder / part / "config.json", config)
    structlora.write_json(folder / "llava" / "pytorch_model.bin.index.json",
                          {"weight_map": dict.fromkeys(state, name)})


# ---------------------------------------------------------------------------------------------
# Data


class Example(NamedTuple):
    """A conversation about a picture, and how the answer to its first question is scored."""
    image: Any                       # Path of the file, uint8 pixels [3, H, W], or None
    name: str                        # of the picture, to print
    turns: list                      # (question, answer); "<image>\n" opens the one it comes with
    references: list                 # right answers to the first question
    kind: str                        # "question" (VQA accuracy) or "caption" (CIDEr)


class Row(NamedTuple):
    """Token ids; those from `start` on are answers, but for later `questions` [(from, to)]."""
    tokens: list
    start: int
    questions: list
    image: Any


REMEMBERED = 2048                    # pictures of files kept in memory: 0.7 GB of 336 x 336
# Vicuna v1's template, and what LLaVA-1.5 asks for short answers and for captions.
SYSTEM = ("A chat between a curious user and an artificial intelligence assistant. The assistant "
          "gives helpful, detailed, and polite answers to the user's questions. ")
SHORT = "\nAnswer the question using a single word or phrase."
CAPTION = "Provide a one-sentence caption for the provided image."


def read_data(path: Path, images: str | Path | None, seed: int) -> tuple[list, list]:
    """(training, test) examples of a folder of *train*.json and *val*.json (*test*, *dev*), or of a
    file, from which the conversations on a tenth of the pictures are held out."""
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    images = Path(images or (path if path.is_dir() else path.parent))
    if not path.is_dir():
        examples = read_examples([path], images)
        names = sorted({e.name for e in examples})
        order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
        held = {names[i] for i in order[:max(1, len(names) // 10)]}
        train, test = ([e for e in examples if (e.name in held) == side] for side in (False, True))
    else:
        files = sorted(path.glob("*.json"))
        train, test = (read_examples([f for f in files if re.search(words, f.name)], images)
                       for words in ("train", "val|test|dev"))
    if not train or not test:
        raise InputError(f"{path}: {len(train)} training and {len(test)} test examples are too few "
                         "(a folder needs *train*.json and *val*.json)")
    return train, test


def read_examples(files: list[Path], images: Path) -> list[Example]:
    """Examples of .json files, each told by its content; VQAv2's annotations may be any of them, or
    lie beside the questions."""
    read = functools.partial(structlora.read_json, kind=object)
    contents = {file: read(file) for file in files}
    answers, examples = {}, []
    for file, content in contents.items():
        if isinstance(content, dict) and "questions" in content:
            near = [f for f in file.parent.glob("*annotations*.json") if f not in contents]
            for value in [*contents.values(), *map(read, near)]:
                said = value.get("annotations") if isinstance(value, dict) else None
                said = said if isinstance(said, list) else ()
                answers |= {str(a["question_id"]): a for a in said
                            if isinstance(a, dict) and "question_id" in a}
    for file, content in contents.items():
        try:
            match content:
                case list():
                    found = [parse_conversation(r, f"{file}: record {n}")
                             for n, r in enumerate(content, 1)]
                case {"questions": list(questions)}:
                    found = [parse_question(q, answers, content, file) for q in questions]
                case {"images": list(pictures), "annotations": list(captions)}:
                    found = parse_captions(pictures, captions)
                case {"annotations": [{"question_id": _}, *_]}:
                    found = []
                case _:
                    raise InputError(f"{file}: expected LLaVA's conversations, COCO captions, or "
                                     "VQAv2's questions and annotations")
            for e in found:
                texts = [e.name, *e.references, *(text for turn in e.turns for text in turn)]
                if not all(isinstance(text, str) for text in texts):
                    raise TypeError(f"no text: {texts}")
                if not e.references or sum(t.count("<image>") for turn in e.turns
                                           for t in turn) != bool(e.name):
                    raise ValueError(f"{e.name} has no answers, or its text says <image>")
        except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{file}: a record is damaged: {type(error).__name__}: "
                             f"{structlora.one_line(error)}") from None
        examples += [e._replace(image=find_picture(images, e.name, file)) if e.name else e
                     for e in found]
    return examples


def parse_conversation(record: dict, where: str) -> Example:
    """LLaVA's {"image": file, "conversations": [{"from": "human" or "gpt", "value": text}]}; the
    picture goes before the text it comes with, as in LLaVA's own training."""
    said = [(turn["from"], turn["value"]) for turn in record["conversations"]]
    said = said[1:] if said and said[0][0] != "human" else said
    if not said or len(said) % 2 or [who for who, _ in said] != ["human", "gpt"] * (len(said) // 2):
        raise InputError(f"{where}: expected human and gpt in turn")
    texts = [text for _, text in said]
    count = sum(text.count("<image>") for text in texts)
    if count != ("image" in record) or any("<image>" in text for text in texts[1::2]):
        raise InputError(f"{where}: {count} times <image> with "
                         f"{'an' if 'image' in record else 'no'} image; one for each is expected")
    texts = [("<image>\n" + text.replace("<image>", "").strip()).strip() if "<image>" in text
             else text for text in texts]
    short = len(texts[1].split()) <= 4
    return Example(None, record.get("image", ""), list(zip(texts[::2], texts[1::2])),
                   [texts[1]] * (10 if short else 1), "question" if short else "caption")


def parse_question(question: dict, answers: dict, file: dict, path: Path) -> Example:
    """A question of VQAv2; its picture is named as COCO's are, or by a field "image"."""
    number = str(question["question_id"])
    if number not in answers:
        raise InputError(f"{path}: no annotation answers question {number}")
    name = question.get("image") or (f"COCO_{file['data_subtype']}_{question['image_id']:012d}.jpg")
    said = answers[number]
    return Example(None, name, [(f"<image>\n{question['question']}{SHORT}",
                                 said["multiple_choice_answer"])],
                   [answer["answer"] for answer in said["answers"]], "question")


def parse_captions(pictures: list, captions: list) -> list[Example]:
    """COCO captions: one example per caption, with all captions of the picture as references."""
    names = {picture["id"]: picture["file_name"] for picture in pictures}
    of = {number: [] for number in names}
    for caption in captions:
        of[caption["image_id"]].append(caption["caption"].strip())
    return [Example(None, names[number], [(f"<image>\n{CAPTION}", text)], texts, "caption")
            for number, texts in of.items() for text in texts]


@functools.lru_cache(maxsize=64)
def subfolders(folder: Path) -> list[Path]:
    """The folder and those in it, which COCO's pictures are sorted into."""
    return [folder, *sorted(d for d in folder.iterdir() if d.is_dir())] if folder.is_dir() else []


def find_picture(folder: Path, name: str, source: Path) -> Path:
    """Path of a picture in the folder or one below it. Raises InputError if there is none, or if
    its kind cannot be read here."""
    path = next((d / name for d in subfolders(folder) if (d / name).is_file()), None)
    if path is None:
        raise InputError(f"{folder / name}: no such picture; {source} names it (--images is the "
                         "folder to look in)")
    if path.suffix.lower() not in (".ppm", ".npy"):
        try:
            import PIL  # noqa: F401
        except ImportError:
            raise InputError(f"{path}: reading it needs Pillow: pip install pillow") from None
    return path


def read_picture(path: Path) -> torch.Tensor:
    """uint8 pixels [3, H, W] of a file. Raises InputError that names it."""
    try:
        if path.suffix.lower() == ".npy":
            pixels = np.lib.format.open_memmap(path, "r")    # not larger than the file; no objects
        elif path.suffix.lower() == ".ppm":
            pixels = read_ppm(path.read_bytes())
        else:
            from PIL import Image
            with Image.open(path) as image:
                pixels = np.array(image.convert("RGB"))
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
            raise ValueError(f"{pixels.dtype} {list(pixels.shape)}, expected uint8 [H, W, 3]")
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
    except (OSError, ValueError, SyntaxError, EOFError, OverflowError, MemoryError,
            tokenize.TokenError) as error:       # the last of a damaged header of a .npy
        raise InputError(f"{path}: not a readable picture ({structlora.one_line(error)})") from None


def read_ppm(data: bytes) -> np.ndarray:
    """A binary PPM of 8 bits a channel, [H, W, 3]."""
    head = re.match(rb"P6(?:\s+(?:#[^\n]*\n\s*)*(\d+))(?:\s+(?:#[^\n]*\n\s*)*(\d+))"
                    rb"(?:\s+(?:#[^\n]*\n\s*)*(\d+))\s", data)
    if not head or int(head[3]) != 255:
        raise ValueError("not a PPM of kind P6 with 255 as the largest value")
    width, height = int(head[1]), int(head[2])
    return np.frombuffer(data, np.uint8, 3 * width * height, head.end()).reshape(height, width, 3)


def fit(pixels: torch.Tensor, size: int, pad: bool) -> torch.Tensor:
    """uint8 [3, H, W] -> uint8 [3, size, size]: padded to a square with CLIP's mean colour
    (LLaVA-1.5), or not; then CLIP's way: shorter side to `size` (bicubic), centre crop."""
    _, H, W = pixels.shape
    if pad and H != W:
        S, colour = max(H, W), torch.tensor([int(255 * mean) for mean in CLIP_MEAN])
        square = colour.to(torch.uint8)[:, None, None].repeat(1, S, S)
        top, left = (S - H) // 2, (S - W) // 2
        square[:, top:top + H, left:left + W] = pixels
        pixels, H, W = square, S, S
    if min(H, W) != size or H != W:
        shape = (size, int(size * W / H)) if H <= W else (int(size * H / W), size)
        pixels = F.interpolate(pixels[None], shape, mode="bicubic", antialias=True)[0]
        top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
        pixels = pixels[:, top:top + size, left:left + size]
    return pixels


@functools.lru_cache(maxsize=REMEMBERED)
def fitted(path: Path, size: int, pad: bool) -> torch.Tensor:
    """The pixels of a file as the tower wants them; the last ones read are remembered."""
    return fit(read_picture(path), size, pad)


def load_images(rows: list, view: tuple, device: str) -> torch.Tensor | None:
    """Normalised images [M, 3, S, S] of the rows that have one, as Llava.view says."""
    c, pad = view
    ready = [(fitted if isinstance(row.image, Path) else fit)(row.image, c.image_size, pad)
             for row in rows if row.image is not None]
    return vit.prepare(torch.stack(ready).to(device), c) if ready else None


def encode(tokenizer: Any, example: Example, length: int, answered: bool = True) -> Row:
    """A conversation in Vicuna's template, as LLaVA-1.5 tokenises it: the text on either side of a
    picture by itself, each round by itself, </s> after each answer; None as the question leaves
    the picture alone, as in LLaVA's first stage. Without answers: the first question, for
    generation. At most `length` tokens: the end is lost."""
    def pieces(text: str, first: bool) -> list[int]:
        ids = []
        for i, piece in enumerate(text.split("<image>")):
            ids += [IMAGE_TOKEN] * bool(i) + tokenizer.encode(piece, bos=first and not i)
        return ids

    tokens, spans = [], []
    for number, (question, answer) in enumerate(example.turns):
        prompt = f"{'' if number else SYSTEM}USER: {question} ASSISTANT:"
        prompt = "<image>" if question is None else prompt
        head = pieces(prompt, not number)
        if not answered:
            return Row(head, len(head), [], example.image)
        spans.append((len(tokens), len(tokens) + len(head)))
        tokens += pieces(f"{prompt} {answer}", not number) + [tokenizer.eos_id]
    return Row(tokens[:length], spans[0][1], spans[1:], example.image)


def collate(rows: list[Row], view: tuple, device: str) -> tuple:
    """Images [M, 3, S, S] or None, token ids [N, T] and which of them are answers [N, T]."""
    tokens, answers = llama.collate(rows, device)
    for n, row in enumerate(rows):
        for start, end in row.questions:
            answers[n, start:end] = False
    return load_images(rows, view, device), tokens, answers


# ---------------------------------------------------------------------------------------------
# Generation and metrics


@torch.no_grad()
def answer(model: Llava, tokenizer: Any, examples: list[Example], args) -> list[str]:
    """What the model says to the first question of each example, greedily."""
    rows = [encode(tokenizer, e, args.max_length, answered=False) for e in examples]
    order = sorted(range(len(rows)), key=lambda i: (rows[i].image is None, len(rows[i].tokens)))
    parts = [order[at:at + 2 * args.batch_size] for at in range(0, len(order), 2 * args.batch_size)]

    def say(indices):
        T = max(len(rows[i].tokens) for i in indices)
        padded = [[-1] * (T - len(rows[i].tokens)) + rows[i].tokens for i in indices]
        tokens = torch.tensor(padded, device=args.device)                        # [N, T]
        images = load_images([rows[i] for i in indices], model.view, args.device)
        embeddings, _, real = model.splice(images, tokens.masked_fill(tokens == -1, 0),
                                           tokens != -1)
        N, S, _ = embeddings.shape
        out = llama.generate(model, tokens.new_zeros(N, S), args.max_new_tokens, real=real,
                             eos_id=tokenizer.eos_id, embeddings=embeddings)
        return [tokenizer.decode(ids).strip() for ids in out[:, S:].tolist()]    # </s>: no text

    texts = dict(zip(order, sum(structlora.divided(say, parts), [])))
    return [texts[i] for i in range(len(rows))]


NUMBERS = {"none": "0"} | {word: str(n) for n, word in enumerate(
    "zero one two three four five six seven eight nine ten".split())}
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
    script leaves both as they are if all references are equal."""
    said, wanted = normalise(answer), [normalise(reference) for reference in references]
    if not wanted:
        raise ValueError("vqa_accuracy needs at least one reference")
    agree = wanted.count(said)
    return sum(min(1, (agree - (other == said)) / 3) for other in wanted) / len(wanted)


def cider(candidates: list[str], references: list[list[str]]) -> float:
    """CIDEr-D (Vedantam et al. 2015) as pycocoevalcap computes it, on a scale of 0 to 10.

    Mean over the candidates of the mean cosine, times 10, of tf-idf vectors of n-grams (n = 1 to
    4), clipped, with a Gaussian penalty of sigma 6 on the difference in length. Document
    frequencies count the pictures whose references hold the n-gram. Words are split on white space.
    """
    if len(candidates) != len(references) or not candidates or not all(references):
        raise ValueError(f"cider needs references for each candidate: {len(candidates)} candidates,"
                         f" {len(references)} lists of references")
    def count(text):
        words = text.split()
        return Counter(tuple(words[i:i + n]) for n in range(1, 5)
                       for i in range(len(words) - n + 1))

    wanted = [[count(text) for text in texts] for texts in references]
    frequency = Counter(gram for counts in wanted for gram in set().union(*counts))
    idf = lambda gram: math.log(len(wanted)) - math.log(max(1, frequency[gram]))

    def vectors(counts):                                         # per n; length in 2-grams
        by_n = [{g: k * idf(g) for g, k in counts.items() if len(g) == n} for n in range(1, 5)]
        norms = [math.sqrt(sum(w * w for w in v.values())) for v in by_n]
        return by_n, norms, sum(k for g, k in counts.items() if len(g) == 2)

    def similarity(a, b):
        total = 0.0
        for v, w, norm_v, norm_w in zip(a[0], b[0], a[1], b[1]):
            dot = sum(min(v[g], w[g]) * w[g] for g in v if g in w)       # not a set: same order
            total += dot / (norm_v * norm_w) if norm_v and norm_w else dot
        return total / 4 * math.exp(-(a[2] - b[2]) ** 2 / (2 * 6 ** 2))

    return sum(10 * sum(similarity(vectors(count(text)), vectors(each)) for each in mine)
               / len(mine) for text, mine in zip(candidates, wanted)) / len(candidates)


def plain(text: str) -> str:
    """Lower-case words without punctuation, nearly what COCO's tokenizer leaves."""
    return " ".join(re.findall(r"[\w'-]+", text.lower()))


def make_task(train: list[Example], test: list[Example], tokenizer: Any, view: tuple, args,
              batch_size: int, share: slice = slice(None)) -> Task:
    """Cross entropy of the answers' tokens of a batch, or of this rank's share of it; VQA accuracy
    of questions and CIDEr of captions."""
    rows, scored = ([row for e in part if (row := encode(tokenizer, e, args.max_length)).start
                     < len(row.tokens)] for part in (train, test))
    scored.sort(key=lambda row: -len(row.tokens))
    if not rows or not scored:
        raise InputError(f"--max-length {args.max_length}: no answer of the data fits")

    seen = {"trained": False, "frozen": False}

    def batch(number):
        seen["trained"] = True
        chosen = llama.rows_of_batch(rows, batch_size, number, args.seed)[share]
        return collate(chosen, view, args.device)

    def loss(model, batch):
        images, tokens, answers = batch
        return llama.answer_losses(functools.partial(model, images), (tokens, answers))

    def evaluate(model):
        texts = answer(model, tokenizer, test, args)
        asked = [(e, t) for e, t in zip(test, texts) if e.kind == "question"]
        told = {e.name: (e, t) for e, t in zip(test, texts) if e.kind == "caption"}.values()
        samples = [*asked[:2], *told][:4]
        for example, text in samples if seen["trained"] or not seen["frozen"] else ():
            question = example.turns[0][0].removeprefix("<image>\n").removesuffix(SHORT)
            print(f"{example.name}: {question!r} -> {text!r} (right: {example.references[0]!r})",
                  flush=True)
        seen.update(trained=False, frozen=True)          # a frozen model's are printed once only
        size = 2 * args.batch_size
        losses = structlora.divided(
            lambda rows: loss(model, collate(rows, view, args.device)).cpu(),
            [scored[i:i + size] for i in range(0, len(scored), size)])
        scores = {"loss": float(torch.cat(losses).mean())}
        if told:
            scores["cider"] = cider([plain(t) for _, t in told],
                                    [[plain(r) for r in e.references] for e, _ in told])
        if asked:
            scores["accuracy"] = sum(vqa_accuracy(t, e.references) for e, t in asked) / len(asked)
        return scores

    return Task(batch, lambda model, batch: loss(model, batch).mean(), evaluate,
                num_examples=sum(len(row.tokens) - row.start for row in rows),
                score="accuracy" if any(e.kind == "question" for e in test) else "cider",
                size=lambda batch: int(batch[2][:, 1:].sum()))


# ---------------------------------------------------------------------------------------------
# Demo: scenes that the script draws itself, and CIFAR-10 in words


SCENES = {"pretrain": 3000, "adapt": 600, "val": 300}            # how many are drawn
COLOURS = {"red": (220, 40, 40), "green": (40, 190, 60), "blue": (50, 80, 230),
           "yellow": (230, 210, 40), "white": (235, 235, 235), "purple": (160, 60, 200)}
CIFAR = "airplane automobile bird cat deer dog frog horse ship truck".split()   # in label order
SHAPES = {"circle": lambda u, v: np.hypot(u, v) < 1,             # of radius 1 around the origin
          "square": lambda u, v: np.maximum(abs(u), abs(v)) < .85,
          "triangle": lambda u, v: (v < .8) & (2 * abs(u) < v + 1),
          "cross": lambda u, v: ((np.minimum(abs(u), abs(v)) < .3)
                                 & (np.maximum(abs(u), abs(v)) < 1))}


class Words:
    """A token for each word and mark of the texts that a small model is made for."""

    def __init__(self, texts: list[str]):
        self.words = sorted({word for text in texts for word in self.split(text)})
        self.ids = {word: i for i, word in enumerate(self.words)}
        self.bos_id, self.eos_id, self.unknown, self.vocab_size = range(
            len(self.words), len(self.words) + 4)

    split = staticmethod(re.compile(r"\w+|[^\w\s]|\n").findall)

    def encode(self, text: str, bos: bool = True, eos: bool = False) -> list[int]:
        """Words(["a cat"]).encode("a dog") -> [2, 0, 4]"""
        ids = [self.ids.get(word, self.unknown) for word in self.split(text)]
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def decode(self, ids: list[int]) -> str:
        """Words with a space between them; special tokens leave none."""
        return " ".join(self.words[i] for i in ids if i < len(self.words))


def draw_scene(rng) -> tuple[np.ndarray, list]:
    """A picture [32, 32, 3] of two shapes side by side, and [(colour, shape), (colour, shape)] from
    left to right."""
    colours, shapes = (rng.permutation(list(table))[:2] for table in (COLOURS, SHAPES))
    pixels = rng.integers(0, 50, (32, 32, 3)).astype(np.uint8)
    y, x = np.mgrid[:32, :32]
    for side, (colour, shape) in enumerate(zip(colours, shapes)):
        radius = rng.uniform(5, 7)
        u = (x - 8 - 16 * side - rng.uniform(-1, 1)) / radius
        v = (y - 16 - rng.uniform(-7, 7)) / radius
        pixels[SHAPES[shape](u, v)] = np.clip(rng.normal(COLOURS[colour], 12), 0, 255)
    return pixels, [(str(c), str(s)) for c, s in zip(colours, shapes)]


def ask_scene(rng, facts: list) -> tuple[str, str]:
    """A question about a scene and its answer."""
    colour, shape = facts[rng.integers(2)]
    return [(f"What colour is the {shape}?", colour),
            (f"What shape is {colour}?", shape)][rng.integers(2)]


def write_scenes(folder: Path, seed: int) -> None:
    """FOLDER/scenes/*.ppm, and in the formats that are published: captions to pretrain on and held
    out (COCO), conversations to adapt to (LLaVA), questions to test (VQAv2)."""
    rng = np.random.default_rng(seed)
    (folder / "scenes").mkdir(parents=True, exist_ok=True)
    scenes = {}
    for part, count in SCENES.items():
        scenes[part] = []
        for n in range(count):
            pixels, facts = draw_scene(rng)
            name = f"{part}{n:04d}.ppm"
            (folder / "scenes" / name).write_bytes(b"P6 32 32 255\n" + pixels.tobytes())
            scenes[part].append((name, facts))

    def coco(part):
        return {"images": [{"id": n, "file_name": name} for n, (name, _) in enumerate(part)],
                "annotations": [{"image_id": n, "caption": f"a {c} {s} and a {d} {t}"}
                                for n, (_, ((c, s), (d, t))) in enumerate(part)]}

    asked = [(name, *ask_scene(rng, facts)) for name, facts in scenes["adapt"]]
    tested = [(name, *ask_scene(rng, facts)) for name, facts in scenes["val"]]
    for file, content in {
            "pretrain/captions_train.json": coco(scenes["pretrain"]),
            "pretrain/captions_val.json": coco(scenes["val"][:100]),
            "adapt/captions_train.json": coco(scenes["adapt"]),
            "adapt/train.json": [{"image": name, "conversations": [
                {"from": "human", "value": f"<image>\n{question}{SHORT}"},
                {"from": "gpt", "value": text}]} for name, question, text in asked],
            "adapt/captions_val.json": coco(scenes["val"][:100]),
            "adapt/val_questions.json": {"questions": [
                {"question_id": n, "image": name, "question": question}
                for n, (name, question, _) in enumerate(tested)]},
            "adapt/val_annotations.json": {"annotations": [
                {"question_id": n, "multiple_choice_answer": text,
                 "answers": [{"answer": text}] * 10}
                for n, (_, _, text) in enumerate(tested)]}}.items():
        (folder / file).parent.mkdir(exist_ok=True)
        structlora.write_json(folder / file, content)


def cifar_examples(folder: Path, seed: int) -> tuple[list, list]:
    """((train, test) captions to pretrain on, (train, test) questions to adapt to) of CIFAR-10."""
    data, rng = vit.read_cifar(folder), np.random.default_rng(seed)
    source, target = ([], []), ([], [])
    for part, images in enumerate(data):
        for n, (pixels, label) in enumerate(zip(images.pixels, images.labels.tolist())):
            name, text = f"{('data_batch', 'test_batch')[part]}#{n}", f"a photo of a {CIFAR[label]}"
            caption = Example(pixels, name, [(f"<image>\n{CAPTION}", text)], [text], "caption")
            question, text = [
                ("What is in the picture?", CIFAR[label]),
                ("Is it an animal or a vehicle?", "vehicle" if label in (0, 1, 8, 9) else "animal"),
                ("Can it fly?", "yes" if label in (0, 2) else "no"),
                ("Does it have wheels?", "yes" if label in (0, 1, 9) else "no")][rng.integers(4)]
            if n % 5 if part == 0 else n < 300:                  # pretrain on four of five
                source[part].append(caption)
            if n % 5 == 0:
                target[part].append(caption)
                target[part].append(caption._replace(
                    turns=[(f"<image>\n{question}{SHORT}", text)], references=[text] * 10,
                    kind="question"))
    return source, target


def small_llava(vocab_size: int, size: int, patch: int) -> Llava:
    """A LLaVA that a CPU can pretrain."""
    config = llama.LlamaConfig(vocab_size, dim=64, num_layers=4, num_heads=4, num_kv_heads=4,
                               head_dim=16, hidden_dim=168)
    vision = vit.ViTConfig(size, patch, width=64, depth=3, heads=4, mlp=128, eps=1e-5,
                           mean=CLIP_MEAN, std=CLIP_STD)
    return Llava(config, vision).initialise()


def pretrained(source: tuple, tokenizer: Words, args) -> Path:
    """Folder of a small LLaVA pretrained on captions; kept under --out, and made anew when the
    options that it depends on have changed."""
    folder = Path(args.out) / "backbone"
    path, recipe = folder / "llava" / "config.json", [args.data, args.pretrain_steps, args.seed]
    if structlora.has_backbone(path, structlora.read_json, recipe, args):
        return folder
    torch.manual_seed(args.seed)
    model = small_llava(tokenizer.vocab_size, 32, 4 if args.data else 8).to(args.device)
    train, test = source             # most as in LLaVA's first stage: a picture, then its caption
    train = [e._replace(turns=[(None, e.turns[0][1])]) for e in train] + train[::6]
    task = make_task(train, test, tokenizer, model.view, args, batch_size=32)
    structlora.pretrain(model, task, args, args.pretrain_steps, lr=4e-3)
    structlora.on_rank_zero(save_llava, model, folder, recipe=recipe)
    return folder


# ---------------------------------------------------------------------------------------------
# Main


def parse_options() -> Any:
    """The shared options and those of this script, checked."""
    p = structlora.make_parser(__doc__, rank=2, out="out/llava", batch_size=16, steps=200)
    p.add_argument("--vision-checkpoint", help="CLIP's folder; not needed if --checkpoint holds "
                   "the tower")
    p.add_argument("--projector", help="an mm_projector.bin to use instead of --checkpoint's")
    p.add_argument("--tokenizer", help="a tokenizer.model; default: --checkpoint's")
    p.add_argument("--images", help="folder of the pictures that --data names (default: its own)")
    p.add_argument("--max-length", type=structlora.positive(int), default=2048, help="tokens of a "
                   "conversation; longer ones lose their end")
    p.add_argument("--max-new-tokens", type=structlora.positive(int), default=32)
    p.add_argument("--test-examples", type=structlora.positive(int), default=2000, help="how many "
                   "to score; they are drawn by --seed")
    p.add_argument("--tune-projector", action="store_true", help="train the projector too")
    p.add_argument("--tune-vision", action="store_true", help="adapt the tower's attention too; "
                   "its layers are a graph of their own")
    p.add_argument("--gradient-checkpointing", action="store_true", help="recompute the language "
                   "model's layers in the backward pass: memory of one layer instead of all")
    p.add_argument("--pretrain-steps", type=structlora.positive(int), default=700)
    args = p.parse_args()
    args.targets = ",".join(qualified(args.targets, args.tune_vision))
    structlora.check_options(args)
    if args.data and not args.checkpoint and not any(Path(args.data).glob("data_batch_*.bin")):
        raise InputError(f"--data {args.data} needs --checkpoint; only CIFAR-10's folder "
                         "(data_batch_*.bin) is enough to pretrain on")
    for name in ("vision_checkpoint", "projector", "tokenizer"):
        if getattr(args, name) and not args.checkpoint:
            raise InputError(f"--{name.replace('_', '-')} goes with --checkpoint")
    return args


def qualified(targets: str, vision: bool) -> list[str]:
    """The language model's and the tower's attention layers have the same names: q_proj is
    self_attn.q_proj of the former, and with --tune-vision attn.q_proj of the latter too."""
    result = []
    for name in targets.split(","):
        both = name in ("q_proj", "k_proj", "v_proj", "o_proj")
        result += [f"self_attn.{name}"] + [f"attn.{name}"] * vision if both else [name]
    return result


def choose(examples: list[Example], args, default: int | None = None) -> list[Example]:
    """--shots questions and --shots captions, or --fraction of each."""
    kinds = torch.tensor([e.kind == "caption" for e in examples]).long()
    shots = args.shots or (None if args.fraction else default)
    return [examples[i] for i in structlora.choose(kinds, shots, args.fraction, args.seed)]


def print_scores(folders: list[Path]) -> None:
    """The table of VQA accuracy and CIDEr (x 100, as they are reported), from metrics.jsonl."""
    rows = []
    for folder in folders:
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        before, after = json.loads(lines[0]), json.loads(lines[-1])
        rows.append({"run": folder.name} | {
            f"{name} {when}": f"{100 * scores[key]:.1f}"
            for key, name in (("accuracy", "VQA accuracy"), ("cider", "CIDEr")) if key in after
            for when, scores in (("before", before), ("after", after))})
    structlora.print_table(rows)


def main() -> None:
    """Data, backbone, then the methods on the same examples; prints the tables."""
    args = parse_options()
    out, folder, tower = Path(args.out), args.checkpoint, args.vision_checkpoint
    cifar = args.data and any(Path(args.data).glob("data_batch_*.bin"))
    if cifar:
        source, (train, test) = cifar_examples(Path(args.data), args.seed)
    elif args.data:
        train, test = read_data(Path(args.data), args.images, args.seed)
    if folder:
        tokenizer = llama.load_tokenizer(args.tokenizer or folder)
    else:
        structlora.open_run(out, args)
        if not cifar:
            if not args.eval_only:
                structlora.on_rank_zero(write_scenes, out / "demo", args.seed)
            source, (train, test) = (read_data(out / "demo" / part, out / "demo/scenes", args.seed)
                                     for part in ("pretrain", "adapt"))
        tokenizer = Words([SYSTEM + "USER ASSISTANT:", *(text for e in source[0] + train
                                                         for turn in e.turns for text in turn)])
        backbone = pretrained(source, tokenizer, args)
        folder, tower = backbone / "llava", backbone / "clip"
    train = choose(train, args, None if args.checkpoint else 200)
    kept = torch.randperm(len(test), generator=torch.Generator().manual_seed(args.seed))
    test = [test[i] for i in kept[:args.test_examples].sort().values]

    def load():
        model = load_llava(folder, tower, getattr(torch, args.dtype), args.device, args.projector)
        llama.check_vocabulary(model, tokenizer, folder)
        model.gradient_checkpointing = args.gradient_checkpointing
        return model

    view = load().view               # a bad file must be found before anything is written, and
    for example in (test + train)[:REMEMBERED]:              # a bad picture too, if they are few
        if isinstance(example.image, Path):
            fitted(example.image, view[0].image_size, view[1])
    task = make_task(train, test, tokenizer, view, args, *structlora.global_batch(args))
    if args.checkpoint:
        structlora.open_run(out, args)
    structlora.compare(args, load, task, save_merged, LEARNING_RATES,
                       ("model.mm_projector",) if args.tune_projector else ())
    if not args.eval_only:
        one = args.method or args.checkpoint
        print_scores([out] if one else [out / n for n in ("lora", "lora_matched", "structlora")])


if __name__ == "__main__":
    raise SystemExit(structlora.run(main))
