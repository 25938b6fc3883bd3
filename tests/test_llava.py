"""train_llava.py: model and checkpoints against transformers, data, pictures, command line.

The expected logits below were printed by `python tests/test_llava.py`, which needs transformers."""

import functools
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import structlora
import train_llava
from helpers import DATA, waves
from structlora import Config, attach
from test_tokenizer import rank_file
from train_llama import Bytes, LlamaConfig, load_tokenizer
from train_llava import IMAGE_TOKEN, SHORT, Example, collate, encode, load_llava, read_data

# vocabulary, width, layers, heads, key-value heads, SwiGLU | picture, patch, width, layers, heads
SIZES = {"plain": (11, 16, 2, 2, 2, 24, 12, 4, 12, 3, 2),
         "grouped": (9, 24, 1, 4, 2, 20, 10, 5, 8, 2, 1)}
PLAIN, I = SIZES["plain"], IMAGE_TOKEN
# What config.json of liuhaotian/llava-v1.5-7b and of openai's CLIP hold besides sizes, less what
# is empty (null, false, "", [], {}).
PUBLISHED_LLAVA = """{"_name_or_path": "llava-v1.5-7b", "architectures": ["LlavaLlamaForCausalLM"],
 "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "initializer_range": 0.02,
 "max_length": 4096, "max_position_embeddings": 4096, "mm_hidden_size": 1024, "pad_token_id": 0,
 "mm_vision_tower": "openai/clip-vit-large-patch14-336", "pretraining_tp": 1, "use_cache": true,
 "torch_dtype": "float16", "transformers_version": "4.31.0", "use_mm_proj": true,
 "mm_resampler_type": null, "tune_mm_mlp_adapter": false}"""
PUBLISHED_CLIP = """{"attention_dropout": 0.0, "dropout": 0.0, "chunk_size_feed_forward": 0,
 "diversity_penalty": 0.0, "encoder_no_repeat_ngram_size": 0, "id2label": {"0": "LABEL_0"},
 "initializer_factor": 1.0, "initializer_range": 0.02, "label2id": {"LABEL_0": 0}, "top_p": 1.0,
 "length_penalty": 1.0, "max_length": 20, "min_length": 0, "model_type": "clip_vision_model",
 "no_repeat_ngram_size": 0, "num_beams": 1, "num_beam_groups": 1, "num_return_sequences": 1,
 "projection_dim": 512, "repetition_penalty": 1.0, "return_dict": true, "top_k": 50,
 "temperature": 1.0, "tie_word_embeddings": true, "transformers_version": "4.16.0.dev0",
 "typical_p": 1.0, "torch_dtype": null, "pruned_heads": {}}"""
ROWS = [[I, 2, 3], [1, 5, 3, I, 2, 6, 4], [2, I, 3, I, 5], [1, 2, 3, 4]]
EXPECTED = {           # the first four logits after the last token of each row
    'plain': [[-0.68218, 0.29431, 3.10244, 2.07326], [-0.81646, 0.55838, 3.09021, 1.8429],
              [-1.14881, 0.8324, 2.98274, 1.55721], [-0.96315, 0.5695, 3.10515, 1.85953]],
    'grouped': [[-0.85171, -1.58812, 1.1285, -1.40008], [-0.04606, 0.14494, 0.75485, -1.01623],
                [0.27324, 0.6532, -1.7159, 1.97715], [0.03993, 0.53786, -0.44525, 0.28636]]}

PROCESSOR = {"do_resize": True, "do_center_crop": True, "do_normalize": True, "resample": 3,
             "feature_extractor_type": "CLIPFeatureExtractor", "rescale_factor": 1 / 255,
             "image_mean": [0.5, 0.25, 0.125], "image_std": [0.5, 0.5, 0.25]}


def original(sizes):
    """(LLaVA's state dict, whose names are ours, CLIP's state dict) as they are published."""
    V, D, L, H, K, M, S, P, W, B, _ = sizes
    model = train_llava.Llava(LlamaConfig(V, D, L, H, K, D // H, M),
                              train_llava.vit.ViTConfig(S, P, W, 0, 1, W))
    llava = {name: t.shape for name, t in model.state_dict().items() if "tower" not in name}
    clip = {"embeddings.class_embedding": (W,), "embeddings.patch_embedding.weight": (W, 3, P, P),
            "embeddings.position_embedding.weight": (1 + (S // P) ** 2, W)}
    weights = {"pre_layrnorm": (W,), "post_layernorm": (W,)}     # all that have a bias too
    for layer in (f"encoder.layers.{i}" for i in range(B)):
        weights |= {f"{layer}.layer_norm1": (W,), f"{layer}.layer_norm2": (W,)}
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            weights[f"{layer}.self_attn.{name}"] = W, W
        weights |= {f"{layer}.mlp.fc1": (2 * W, W), f"{layer}.mlp.fc2": (W, 2 * W)}
    for name, shape in weights.items():
        clip |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    clip = {f"vision_model.{name}": shape for name, shape in clip.items()}
    return waves(llava, 0.4), waves(clip, 0.4)


def configs(sizes):
    """What the two config.json say of the language model and of the tower."""
    V, D, L, H, K, M, S, P, W, B, heads = sizes
    return dict(vocab_size=V, hidden_size=D, num_hidden_layers=L, num_attention_heads=H,
                num_key_value_heads=K, intermediate_size=M, rms_norm_eps=1e-5, rope_theta=10000.0
                ), dict(image_size=S, patch_size=P, hidden_size=W, num_hidden_layers=B,
                        num_attention_heads=heads, intermediate_size=2 * W, hidden_act="quick_gelu")


def write(folder, sizes=PLAIN, inside=False, **settings):
    """FOLDER/llava and FOLDER/clip as published; the full CLIP has a text part too."""
    (llava, clip), (text, vision) = original(sizes), configs(sizes)
    (folder / "llava").mkdir(parents=True)
    (folder / "clip").mkdir()
    if inside:                       # a tower that was trained along: other weights than CLIP's
        llava |= {f"model.vision_tower.vision_tower.{k}": t for k, t in clip.items()}
        clip = {k: t + 1 for k, t in clip.items()}
    clip |= {"text_model.embeddings.token_embedding.weight": torch.ones(3, 2),
             "vision_model.embeddings.position_ids": torch.arange(3), "logit_scale": torch.ones(())}
    torch.save(clip, folder / "clip" / "pytorch_model.bin")
    (folder / "clip" / "config.json").write_text(json.dumps({"vision_config": vision}))
    (folder / "clip" / "preprocessor_config.json").write_text(json.dumps(PROCESSOR | {
        "size": sizes[6], "crop_size": {"height": sizes[6], "width": sizes[6]}}))
    for i in (0, 1):
        torch.save(dict(list(llava.items())[i::2]),
                   folder / "llava" / f"pytorch_model-0000{i + 1}-of-00002.bin")
    config = {"model_type": "llava", "mm_projector_type": "mlp2x_gelu", "image_aspect_ratio": "pad",
              "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch",
              "mm_use_im_start_end": False, "mm_use_im_patch_token": False}
    (folder / "llava" / "config.json").write_text(json.dumps(config | text | settings))
    return folder / "llava", folder / "clip"


def load(*arguments, **how):
    return load_llava(*write(*arguments, **how), torch.float32)


def batch(sizes, rows):
    """(images, tokens padded with 0 on the right)"""
    tokens = torch.tensor([row + [0] * (max(map(len, rows)) - len(row)) for row in rows])
    M, S = sum(row.count(I) for row in rows), sizes[6]
    return torch.sin(0.37 * torch.arange(M * 3 * S * S)).view(M, 3, S, S), tokens


def with_transformers(sizes):
    """Logits of each of ROWS by itself, from transformers."""
    import transformers as hf
    text, vision = configs(sizes)
    model = hf.LlavaForConditionalGeneration(hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**vision), text_config=hf.LlamaConfig(**text),
        image_token_index=sizes[0] - 1, projector_hidden_act="gelu", vision_feature_layer=-2,
        vision_feature_select_strategy="default", attn_implementation="eager")).eval()
    theirs, (llava, clip), state = model.state_dict(), original(sizes), {}
    for key, tensor in llava.items():
        key = key.replace("model.", "model.language_model.")
        key = key.replace("projector.0", "projector.linear_1").replace("r.2", "r.linear_2")
        state[key.replace("language_model.mm_", "multi_modal_")] = tensor
    for key, tensor in clip.items():
        key = f"model.vision_tower.{key}"
        state[key if key in theirs else key.replace("vision_model.", "")] = tensor
    model.load_state_dict(state)
    images, result, P = list(batch(sizes, ROWS)[0]), [], (sizes[6] // sizes[7]) ** 2
    for row in ROWS:                 # its processor writes the image token once for each patch
        ids = sum(([sizes[0] - 1] * P if token == I else [token] for token in row), [])
        pixels = [images.pop(0) for token in row if token == I]
        with torch.no_grad():
            result.append(model(input_ids=torch.tensor([ids]), pixel_values=torch.stack(pixels)
                                if pixels else None).logits[0])
    return result


# --- Model and checkpoints

@pytest.mark.parametrize("size, sizes", SIZES.items())
def test_logits_are_those_of_transformers(tmp_path, size, sizes):
    logits, P = load(tmp_path, sizes)(*batch(sizes, ROWS)), (sizes[6] // sizes[7]) ** 2
    lengths = [len(row) + (P - 1) * row.count(I) for row in ROWS]
    assert logits.shape == (len(ROWS), 7 + 2 * (P - 1), sizes[0])
    last = torch.stack([row[length - 1, :4] for row, length in zip(logits, lengths)])
    torch.testing.assert_close(last, torch.tensor(EXPECTED[size]), atol=1e-4, rtol=1e-4)
    pytest.importorskip("transformers")
    for ours, theirs in zip(logits, with_transformers(sizes)):
        torch.testing.assert_close(ours[:len(theirs)], theirs, atol=1e-4, rtol=1e-4)


def test_a_tower_inside_llavas_files_and_what_merge_writes_give_the_same(tmp_path):
    apart, rows = load(tmp_path / "a"), batch(PLAIN, ROWS)
    structlora.write(tmp_path / "m.pt", apart.sizes | {"model": apart.state_dict()})
    merged = load_llava(tmp_path / "m.pt", None, torch.float32)
    assert torch.equal(merged(*rows), apart(*rows)) and merged.vision == apart.vision
    assert torch.equal(load(tmp_path / "b", inside=True)(*rows), apart(*rows))
    structlora.write(tmp_path / "m.pt", {"llama": apart.sizes["llama"], "model": {}})
    with pytest.raises(ValueError, match="m.pt: a LLaMA without a tower"):
        load_llava(tmp_path / "m.pt", "clip")


def test_select_speaks_of_tokens_and_gives_what_follows_them(tmp_path):
    model, P = load(tmp_path), 9
    images, tokens = batch(PLAIN, [[1, I, 4, 5], [I, 2, 3, 6]])
    select = torch.tensor([[True, True, False, True], [True, False, True, False]])
    rows, places = [0, 0, 0, 1, 1], [0, P, P + 2, P - 1, P + 1]  # the last place of a picture
    expected = model(images, tokens)[rows, places]
    assert torch.allclose(model(images, tokens, select=select), expected, atol=1e-5)


def test_questions_of_different_lengths_are_answered_as_each_by_itself(tmp_path):
    model, args = load(tmp_path, (258, *PLAIN[1:])), SimpleNamespace(batch_size=2, device="cpu")
    examples, said = [], []
    for n in range(8):               # each right answer is what the model says to it alone
        pixels = torch.arange(432).view(3, 12, 12).mul(77 + n).byte() if n % 3 else None
        question = ("<image>\n" if n % 3 else "so") + "why " * (1 + n // 2)     # two tokens each
        row = encode(Bytes(), Example(pixels, [(question, "no" * n)], [], "question"))
        images, tokens, _ = collate([row], "cpu", model.vision)
        said += train_llava.answer(model, Bytes(), images, tokens[:, :row.answers.index(True)])
        examples.append(Example(pixels, [(question, "no" * n)], said[-1:] * 10, "question"))
    assert len(set(said)) >= 3
    assert train_llava.evaluate(model, Bytes(), examples, args)["accuracy"] == 1


def test_pictures_and_their_tokens_must_agree_in_number(tmp_path):
    model = load(tmp_path)
    for images, row in ((0, [1, I, 2]), (1, [1, 2]), (3, [I, I])):
        with pytest.raises(ValueError, match=f"{images} images for {row.count(I)} image tokens"):
            model(torch.ones(images, 3, 12, 12) if images else None, torch.tensor([row]))


@pytest.mark.parametrize("pictured", (True, False))
def test_gradients_reach_projector_and_tower(pictured, tmp_path):
    """Zeros where a batch has no picture, so that the tower is not taken for a stray one."""
    model, (images, tokens) = load(tmp_path).train(), batch(PLAIN, ROWS)
    adapters = attach(model, Config(rank=1, targets="q_proj"))
    assert sorted("tower" in graph.names[0] for graph in adapters.graphs) == [False, True]
    model.model.mm_projector.requires_grad_(True)
    model(*(images, tokens) if pictured else (None, tokens[3:])).square().sum().backward()
    probes = [layer.probe for name, layer in adapters.layers.items() if "tower" in name]
    for parameter in (*model.model.mm_projector.parameters(), *probes):
        assert bool(parameter.grad.any()) == pictured
    adapters.observe_gradients()


def change(name, **entries):
    """A function that puts entries into a file of tensors or of JSON; None: that goes."""
    def apply(folder):
        path, keep = folder / name, {k.replace("__", "."): v for k, v in entries.items()}
        old = json.loads(path.read_text()) if path.suffix == ".json" else torch.load(path)
        new = {key: value for key, value in (old | keep).items() if value is not None}
        path.write_text(json.dumps(new)) if path.suffix == ".json" else torch.save(new, path)
    return apply


def tower(**settings):
    """A function that changes the tower's settings."""
    return change("clip/config.json", vision_config=configs(PLAIN)[1] | settings)


CLIP, LLAVA = "clip/pytorch_model.bin", "llava/config.json"
SHARD, IMAGES = "llava/pytorch_model-00002-of-00002.bin", "clip/preprocessor_config.json"
BIAS = "vision_model__pre_layrnorm__bias"
BAD = {  # what is done to the folder, what the line must say
    "no CLIP": (lambda f: (f / CLIP).unlink(), "clip.pytorch_model.bin"),
    "a weight missing": (change(CLIP, **{BIAS: None}), "clip.*norm_pre.bias"),
    "a strange one": (change(CLIP, vision_model__odd=torch.ones(1)), "clip.*odd"),
    "a missing shard": (lambda f: (f / SHARD).unlink(), "llava.pytorch_model-00002-of-00002.bin"),
    "a damaged shard": (lambda f: (f / SHARD).write_bytes(b"PK"), "pytorch_model-00002-of-00002.b"),
    "an adapter": (lambda f: [(f / SHARD).unlink(), (f / SHARD.replace("2-", "1-", 1)).unlink(), (
        f / "llava/adapter_config.json").touch()], "llava.*adapter_config.json|an adapter of PEFT"),
    "a key of LLaVA's": (change(LLAVA, s2_scales="336,672"), "config.json.* s2_scales"),
    "another resampler": (change(LLAVA, mm_resampler_type="qformer"), "mm_resampler_type"),
    "a key of CLIP's": (tower(rope_theta=1e4), "clip.config.json: rope_theta"),
    "another tower": (tower(hidden_act="gelu"), "clip.config.json: hidden_act is 'gelu'; only 'qu"),
    "SigLIP": (tower(model_type="siglip_vision_model"), "model_type is 'siglip_vision_model'"),
    "no normalising": (change(IMAGES, do_normalize=False), "preproc.*: do_normalize is False; onl"),
    "other pixels": (change(IMAGES, rescale_factor=1 / 127.5), "rescale_factor is 0.00784"),
    "other sizes": (change(IMAGES, size={"shortest_edge": 10}), "preproc.*: size {'shortest_edge'"),
    "nearest pixels": (change(IMAGES, resample=0), "preprocessor_config.json: resample is 0"),
    "two channels": (change(IMAGES, image_mean=[0.5, 0.5]), "preprocessor_config.json: exp"),
    "other steps": (change(IMAGES, do_pad=True), "preprocessor_config.json: do_pad"),
    "a layer too far": (change(LLAVA, mm_vision_select_layer=9), "select_layer is 9, of 3"),
    "1.6": (change(LLAVA, image_aspect_ratio="anyres"), "image_aspect_ratio is 'anyres'"),
    "llava-hf": (change(LLAVA, text_config={}), "llava-hf: not supported"),
    "image tokens": (change(LLAVA, mm_use_im_start_end=True), "mm_use_im_start_end: not known")}


def test_what_lies_beside_the_weights_is_not_read(tmp_path):
    """Older shards, an average of the weights; CLIP by itself, as transformers 5 names it."""
    folder, clip = write(tmp_path)
    before = load_llava(folder, clip, torch.float32)(*batch(PLAIN, ROWS))
    weights = {"lm_head.weight": torch.ones(11, 16)}
    shards = {i: f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": shards}))
    for path in (folder / "pytorch_model-00003-of-00003.bin", clip / "pytorch_model-ema.bin"):
        torch.save(weights, path)
    vision = torch.load(clip / "pytorch_model.bin")
    torch.save({name.removeprefix("vision_model."): tensor for name, tensor in vision.items()},
               clip / "pytorch_model.bin")
    after = load_llava(folder, clip, torch.float32)(*batch(PLAIN, ROWS))
    assert torch.equal(before, after)


def test_the_layer_of_config_json_and_published_settings_are_read(tmp_path):
    """The mean and deviation of preprocessor_config.json count, or CLIP's own without one."""
    for layer, depth in ((-2, 2), (-1, 3), (1, 1)):
        model = load(tmp_path / str(layer), mm_vision_select_layer=layer)
        assert len(model.model.vision_tower.blocks) == depth
    model = load(tmp_path / "a", **json.loads(PUBLISHED_LLAVA))
    assert (model.vision.mean, model.vision.std) == ((0.5, 0.25, 0.125), (0.5, 0.5, 0.25))
    folder, clip = write(tmp_path / "b")
    tower(**json.loads(PUBLISHED_CLIP))(tmp_path / "b")
    (tmp_path / "b" / IMAGES).unlink()
    again = load_llava(folder, clip, torch.float32)
    assert (again.vision.mean, again.vision.std) == (train_llava.CLIP_MEAN, train_llava.CLIP_STD)
    assert torch.equal(again(*batch(PLAIN, ROWS)), model(*batch(PLAIN, ROWS)))


@pytest.mark.parametrize("case", BAD)
def test_a_bad_checkpoint_is_refused_by_name_in_one_line(tmp_path, case):
    folders, (spoil, message) = write(tmp_path / "x"), BAD[case]
    spoil(tmp_path / "x")
    with pytest.raises(ValueError, match=message) as caught:
        load_llava(*folders)
    assert "\n" not in str(caught.value) and str(tmp_path / "x") in str(caught.value)


# --- Data

def chat(image, *texts):
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
    return ({"image": image} if image else {}) | {"conversations": turns}


def put(folder, *names, **files):
    """Empty pictures of these names, and FILE.json of each keyword."""
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).touch()
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_conversations_keep_their_order_and_the_picture_comes_first(tmp_path):
    texts = ("What is it?\n<image>", "A cat.", "Sure?", "Yes, it is so.")
    chats = [chat("a.png", *texts), chat("", "HTML?\n<video>\n</video>", "hi")]
    last = [chat("a.png", "<image>\n And this? ", "M\u00fcnchen\u2028 is its name, you know?")]
    put(tmp_path, "a.png", a_train=chats)
    text = json.dumps(last, ensure_ascii=False)                  # as Windows writes it
    (tmp_path / "a_val.json").write_text(text, encoding="utf-8-sig")
    (first, second), (third,) = read_data(tmp_path)
    assert first.turns == [("<image>\nWhat is it?", "A cat."), ("Sure?", "Yes, it is so.")]
    assert first.image == tmp_path / "a.png" and first.references == ["A cat."] * 10
    assert second.image is None and second.turns[0][1] == "hi"
    assert third.turns == [("<image>\nAnd this?", last[0]["conversations"][1]["value"])]
    assert (first.kind, third.kind) == ("question", "caption")
    with pytest.raises(ValueError, match="b.jsonl: expected a .json file"):
        read_data(tmp_path / "b.jsonl")


def test_cocos_own_folder_and_splits_by_whole_words(tmp_path):
    """Files without captions are passed over; latest_train is for training."""
    told = {"images": [{"id": 7, "file_name": "a.png"}], "annotations": [
        {"image_id": 7, "caption": "One cat. "}, {"image_id": 7, "caption": "A cat."}]}
    boxes = told | {"annotations": [{"image_id": 7, "bbox": [1, 2, 3, 4]}]}
    put(tmp_path, latest_train=told, captions_val2014=told, instances_train2014=boxes,
        person_keypoints_val2014=boxes, image_info_test2014={"images": []})
    put(tmp_path / "train2014", "a.png")
    train, (test,) = read_data(tmp_path)
    assert [e.turns[0][1] for e in train] == ["One cat.", "A cat."] == train[0].references
    assert test.kind == "caption" and test.image == tmp_path / "train2014/a.png"


def test_vqa_questions_find_their_answers_in_the_file_beside_them(tmp_path):
    """VQAv2 says which answer stands for all; OK-VQA does not: the most frequent one."""
    asked = {"data_subtype": "val2014", "questions": [
        {"question_id": n, "image_id": 42, "question": f"What {n}?"} for n in range(2)]}
    said = [{"answer": word, "raw_answer": word} for word in ("dog", "cat", "cow", "cat")]
    right = {"question_id": 1, "image_id": 2, "answers": said, "answer_type": "other"}
    put(tmp_path, "COCO_val2014_000000000042.jpg", v2_train_questions=asked,
        v2_train_annotations={"annotations": [right | {"multiple_choice_answer": "cow"}]},
        v2_val_questions=asked, v2_val_annotations={"annotations": [right | {"confidence": 3}]})
    (example,), (other,) = read_data(tmp_path)          # the other question has no answer
    assert example.turns == [(f"<image>\nWhat 1?{SHORT}", "cow")] and other.turns[0][1] == "cat"
    assert example.references == ["dog", "cat", "cow", "cat"] == other.references


def test_a_single_file_holds_out_pictures_not_questions(tmp_path):
    names = [f"{i}.png" for i in range(20)]
    chats = [chat(name, f"<image>\n{q}?", "x") for q in range(3) for name in names]
    path = put(tmp_path, *names, data=chats) / "data.json"
    train, test = read_data(path)
    assert (len(train), len(test)) == (54, 6)
    assert not {e.image for e in train} & {e.image for e in test}
    with pytest.raises(ValueError, match="data.json: 1 picture"):
        read_data(put(tmp_path, data=chats[::20]) / "data.json")
    (tmp_path / "3.png").unlink()
    put(tmp_path, data=chats)
    with pytest.raises(ValueError, match="has no 3.png"):
        read_data(path)


ASKED, KARPATHY = {"question_id": 3, "image_id": 5, "question": "What?"}, {
    "filename": "a.png", "sentences": [{"raw": "x"}], "split": "train", "imgid": 0}


@pytest.mark.parametrize("content, message", [
    ([chat("a.png", "no picture", "x")], "a.json: record 1: expected human and gpt in turn, <i"),
    ([chat("", "<image>", "x")], "record 1"), ([chat("a.png", "<image><image>", "x")], "record 1"),
    ([chat("a.png", "<image>a", "b", "c")], "record 1.*'human', 'gpt', 'human'"),
    ([chat("a.png", "<image>a", "b", "c <image>", "d")], "record 1: .* found .* <image> 2 times"),
    ([{"image": "a.png"}], "record 1: expected a record of conversations, found {'image': 'a.png'"),
    ([chat({"a": "b"}, "<image>a", "b")], "record 1: .*not dict"),
    ([chat(["a.png", "b.png"], "<image>a", "b")], "record 1: .*not list"),
    ([chat("a.png", "<image>a", 7)], "a.json: record 1: value: expected text, found 7"),
    ([chat("a.png", "<image>a", "b") | {"system": "Rhyme."}], "record 1: system: not known"),
    ([chat("a.png", "<image>a", "b") | {"images": ["b"]}], "record 1: images: not known"),
    ([chat("", "a", "b") | {"video": "b.mp4"}], "record 1: video: not known"),
    ([{"conversations": [{"from": "human", "value": "a", "audio": "b.wav"}]}], "audio: not known"),
    ([chat("", "<video>\na", "b")], "record 1: <video>: of pictures, films and"),
    ([chat("a.png", "<image>a", "b", "and in <audio> there?", "c")], "record 1: <audio>"),
    ([chat("", "hm\n<|image_1|>", "b")], r"record 1: <\|image_1\|>"),
    ([chat("a.mp4", "<image>a", "b")], "record 1: 'a.mp4' is no picture"),
    ([[25, 26]], r"record 1: expected a record of conversations, found \[25, 26\]"),
    ({"data": [], "dataset_name": "textvqa"}, "expected a list of LLaVA's .*: {'data': .*tv"),
    ({"201": {"question": "x"}}, "expected a list of LLaVA's .*: {'201'"),
    ({"images": [KARPATHY], "dataset": "coco"}, "COCO's or VQA's object: dataset: not known"),
    ({"questions": [ASKED | {"multiple_choices": ["a", "b"]}]}, "multiple_choices: not known"),
    ({"annotations": [{"image_id": 5, "text": "x"}]}, "expected a record of image_id and caption"),
    ({"annotations": [{"question_id": 1, "multiple_choice_answer": 2, "answers": []}]}, "found 2"),
    ({"images": [], "annotations": [{"image_id": 5, "caption": "x"}]}, "a.json: .*KeyError: 5"),
    ([], "a.json: 0 picture"), ([chat("", "a", "b")], "a.json: 0 picture"), (3, "a.json")])
def test_bad_data_is_named_in_one_line(tmp_path, content, message):
    with pytest.raises(ValueError, match=message) as caught:
        read_data(put(tmp_path, "a.png", a=content) / "a.json")
    assert "\n" not in str(caught.value) and str(tmp_path / "a.json") in str(caught.value)


# --- Pictures and prompts

@pytest.mark.parametrize("shape", ((40, 30), (23, 57), (16, 16)))
def test_pictures_are_padded_and_go_clips_processors_way(shape, monkeypatch):
    """Padded to a square with the mean colour first, as LLaVA-1.5 does."""
    transformers = pytest.importorskip("transformers")
    pixels = np.random.default_rng(1).integers(0, 256, (*shape, 3), dtype=np.uint8)
    monkeypatch.setattr(train_llava.vit, "read_picture", lambda path: pixels)
    row = train_llava.Row([1], [True], Path(f"{shape}.png"))
    vision = train_llava.vit.ViTConfig(16, mean=train_llava.CLIP_MEAN, std=train_llava.CLIP_STD)
    images, _, _ = collate([row, row._replace(image=None)], "cpu", vision)
    square = np.full((max(shape), max(shape), 3), (122, 116, 104), np.uint8)
    top, left = ((max(shape) - n) // 2 for n in shape)
    square[top:top + shape[0], left:left + shape[1]] = pixels
    processor = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
    theirs = processor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})(square)
    theirs = torch.as_tensor(np.array(theirs["pixel_values"]))
    assert images.shape == theirs.shape and (images - theirs).abs().max() < 0.02     # a step of 256


def test_the_prompt_is_vicunas_and_only_answers_are_learned():
    row = encode(Bytes(), Example(None, [("<image>\nA?", "cat"), ("B?", "")], [], "question"))
    text = "".join({I: "<image>", 256: "<s>", 257: "</s>"}.get(i) or chr(i) for i in row.tokens)
    assert text == ("<s>A chat between a curious user and an artificial intelligence assistant. "
                    "The assistant gives helpful, detailed, and polite answers to the user's "
                    "questions. USER: <image>\nA? ASSISTANT: cat</s>USER: B? ASSISTANT: </s>")
    learned = [i for i, wanted in zip(row.tokens, row.answers) if wanted]
    assert learned == [*b" cat", 257, *b" ", 257]
    first = Example("a.png", [(None, "a cat")], [], "caption")   # LLaVA's first stage
    assert encode(Bytes(), first).tokens == [256, I, *b" a cat", 257]


def test_llavas_way_of_tokenising_around_the_picture():
    if not (DATA / "llama2").exists():
        pytest.skip("needs the shared data")
    example = Example(None, [("<image>\nIs it red?", "Yes")], ["Yes"], "question")
    tokens = encode(load_tokenizer(DATA / "llama2"), example).tokens
    at = tokens.index(I)             # by sentencepiece, each side by itself: "\u2581" before "\n"
    assert tokens[:2] == [1, 319] and tokens[at - 4:at] == [3148, 1001, 29901, 29871]
    assert tokens[at + 1:at + 7] == [29871, 13, 3624, 372, 2654, 29973]
    assert tokens[-2:] == [3869, 2]


# --- The command line

def test_the_demo_runs_and_resumes(cli, tmp_path, monkeypatch):
    quick = functools.partial(train_llava.pretrained, steps=2)
    monkeypatch.setattr(train_llava, "pretrained", quick)
    options = "--steps 3 --batch-size 4 --test-examples 8 --device cpu --out out".split()
    status, out, err = cli(train_llava, *options)
    table = [line for line in out.splitlines() if line.startswith("|")]
    assert status == 0 and len(table) == 7 and table[0].count("|") == 9, err
    before = (tmp_path / "out/all/metrics.jsonl").read_text()
    assert cli(train_llava, *options, "--resume")[1].splitlines()[-7:] == table
    assert (tmp_path / "out/all/metrics.jsonl").read_text() == before


@pytest.fixture
def real(tmp_path, monkeypatch):
    """Arguments of a run on files: a LLaVA of 512 tokens with a rank file, pictures, questions."""
    folder, clip = write(tmp_path / "net", (512, *PLAIN[1:]))
    (folder / "tokenizer.model").write_bytes(rank_file(Bytes.tokens))
    monkeypatch.setattr(train_llava.vit, "read_picture", lambda path: np.random.default_rng(
        ord(path.name[0])).integers(0, 256, (6, 8, 3), np.uint8))        # without Pillow
    names = [f"{i}.png" for i in range(4)]
    chats = [chat(name, f"<image>\nColour?{SHORT}", "red") for name in names]
    chats += [chat(name, "<image>\nDescribe.", "a red thing on a table") for name in names]
    put(tmp_path / "data", *names, train=chats, val=chats[::2])
    return ["--checkpoint", folder, "--vision-checkpoint", clip, "--data", tmp_path / "data",
            "--batch-size", 2, "--steps", 2, "--rank", 1, "--lr", 1e-2, "--device", "cpu"]


def test_a_checkpoint_is_adapted_merged_and_read_again(cli, real, tmp_path):
    status, out, err = cli(train_llava, *real, "--merge", "--tune-projector", "--tune-vision")
    assert status == 0 and out.splitlines()[-1].startswith("| structlora r=1"), err
    state = torch.load(tmp_path / "out/llava/adapter.pt")["state"]
    assert sum("mm_projector" in name for name in state) == 4
    assert any("vision_tower.blocks" in name for name in state)
    scores = out.splitlines()[-1].replace(" ", "").split("|")[2:5]
    for more in (real[1:], ["out/llava/merged.pt", "--tokenizer", real[1], *real[4:]]):
        status, out, err = cli(train_llava, "--checkpoint", *more, "--eval-only")
        assert status == 0 and out.splitlines()[-1].replace(" ", "").split("|")[2:5] == scores, err
    more = ["--tune-projector", "--tune-vision", "--resume", "--data"]
    assert cli(train_llava, *real, *more, tmp_path / "data")[0] == 0
    train = json.loads((tmp_path / "data/train.json").read_text())
    put(tmp_path / "data", train=train[::-1])
    status, _, err = cli(train_llava, *real, *more, tmp_path / "data")
    assert status == 2 and "other training or test data" in err


@pytest.mark.parametrize("arguments, message", [
    (["--vision-checkpoint", "gone"], "gone"), (["--images", "gone"], "gone: there is no such"),
    (["--data", "gone"], "gone"), (["--data", "net"], "expected a .json file or a folder"),
    (["--tokenizer", "gone"], "gone")])
def test_a_mistake_is_one_line_and_nothing_is_written(cli, real, tmp_path, arguments, message):
    status, _, err = cli(train_llava, *real, "--out", "new", *arguments)
    assert status == 2 and err.count("\n") == 1 and message in err
    assert not (tmp_path / "new").exists()


if __name__ == "__main__":
    for size, sizes in SIZES.items():
        print(size, [row[-1, :4].tolist() for row in with_transformers(sizes)])
