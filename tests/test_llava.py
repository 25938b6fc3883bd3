"""train_llava.py: model and checkpoints against transformers, pictures, prompts, bad input.

The expected logits below were printed by `python tests/test_llava.py`, which needs transformers."""

import argparse
import base64
import json
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import structlora
import train_llama
import train_llava
from structlora import Config, InputError, attach
from test_tokenizer import sentencepiece_model
from train_llava import (IMAGE_TOKEN, SHORT, Example, collate, encode, fit, load_llava, read_data,
                         read_picture)

torch.set_num_threads(1)
# vocabulary, width, layers, heads, key-value heads, SwiGLU | picture, patch, width, layers, heads
SIZES = {"plain": (11, 16, 2, 2, 2, 24, 12, 4, 12, 3, 2),
         "grouped": (9, 24, 1, 4, 2, 20, 10, 5, 8, 2, 1)}
I = IMAGE_TOKEN
PROMPTS = {"one": [[1, 3, I, 4, 5]],
           "mixed": [[I, 2, 3], [1, 5, 3, I, 2, 6, 4], [4, 2, 1, 6, 3, I], [1, 2, 3, 4]],
           "two": [[2, I, 3, I, 5], [1, I]]}
EXPECTED = {
    ('plain', 'one'): [
        [[-1.78623, 1.06164, 0.62945, 0.24582, 0.22905, 0.43173, 0.62443, 0.43041, -0.22367,
         -0.51408, 0.14584], [0.08883, -1.19367, 0.08367, 1.31964, 1.65602, 1.58714, 0.93717,
         -0.57484, -1.92102, -0.78973, 1.81018], [0.26452, -1.48609, 0.19226, 1.53832, 1.86612,
         1.71305, 0.87005, -0.8491, -2.10827, -0.56869, 2.01719]],
    ],
    ('plain', 'mixed'): [
        [[0.56486, -1.73709, -0.94228, 0.96911, 1.58737, 1.22147, -0.14, -2.05352, -2.36358,
         0.55901, 2.48418], [0.5812, -1.7822, -1.13961, 0.85752, 1.51877, 1.10441, -0.3548,
         -2.28016, -2.37307, 0.7946, 2.52881], [0.24081, -1.3465, 0.37353, 1.52413, 1.77718,
         1.67778, 0.99686, -0.5612, -1.9156, -0.74679, 1.79845]],
        [[-1.78623, 1.06164, 0.62945, 0.24582, 0.22905, 0.43173, 0.62443, 0.43041, -0.22367,
         -0.51408, 0.14584], [1.88929, -0.20451, 0.29014, -0.4899, -0.95883, -0.94703, -0.26159,
         1.10873, 1.82184, 0.0279, -1.97464], [0.18858, -1.34842, 0.35397, 1.53355, 1.79713,
         1.69373, 0.99914, -0.57516, -1.93374, -0.75243, 1.80657]],
        [[0.39001, -1.58544, 0.0327, 1.47729, 1.842, 1.65226, 0.73203, -1.01503, -2.14391,
         -0.42014, 2.07769], [0.31919, -1.49516, -0.24559, 1.31036, 1.76485, 1.58608, 0.63247,
         -1.14895, -2.23805, -0.36176, 2.21278], [0.15451, -1.42323, 0.06856, 1.52575, 1.91488,
         1.7849, 0.93427, -0.85245, -2.21259, -0.65345, 2.1042]],
        [[-1.78623, 1.06164, 0.62945, 0.24582, 0.22905, 0.43173, 0.62443, 0.43041, -0.22367,
         -0.51408, 0.14584], [0.17662, -1.76732, -0.53942, 1.30686, 1.87333, 1.448, -0.0945,
         -2.27757, -2.59821, 0.74062, 2.73517], [0.44976, -1.59163, 0.06738, 1.50076, 1.85924,
         1.68504, 0.78984, -0.96354, -2.15984, -0.48242, 2.09444]],
    ],
    ('plain', 'two'): [
        [[0.09356, -1.17887, 0.65643, 1.60192, 1.77325, 1.73858, 1.22061, -0.23063, -1.77956,
         -1.00242, 1.61552], [0.33461, -1.46549, 0.24855, 1.5258, 1.82247, 1.689, 0.91479,
         -0.72857, -2.01995, -0.64182, 1.91918], [0.26945, -1.47218, 0.20526, 1.53245, 1.85402,
         1.70674, 0.87984, -0.82336, -2.09077, -0.58396, 1.99954]],
        [[-1.78623, 1.06164, 0.62945, 0.24582, 0.22905, 0.43173, 0.62443, 0.43041, -0.22367,
         -0.51408, 0.14584], [1.68406, -0.05443, 0.37063, -0.52301, -1.02189, -0.99335,
         -0.25559, 1.18671, 1.91983, 0.02192, -2.07875], [2.30634, -0.6239, -0.13934, -0.5768,
         -0.95672, -1.10616, -0.72868, 0.52677, 1.74004, 0.60223, -1.84596]],
    ],
    ('grouped', 'one'): [
        [[0.80041, 1.71571, -0.5634, 0.57047, -2.35215, 1.55785, 2.79528, 2.11604, 1.71636],
         [-0.84954, -1.26465, 2.64162, -2.27029, 1.67587, 0.75919, -0.92979, -1.25228,
         -1.12308], [-1.20308, -3.10204, -0.09214, 0.74397, 2.01727, -3.7753, -2.80912, -0.4215,
         0.5165]],
    ],
    ('grouped', 'mixed'): [
        [[-1.53381, -2.57599, 1.87779, -1.47661, 3.01011, -1.65667, -3.14214, -2.17035,
         -1.54323], [-1.65546, -3.00315, 0.91052, -0.199, 2.30401, -2.94467, -2.74078, -0.81165,
         0.04621], [-0.13994, 0.0525, -1.75977, 1.33219, 0.05657, -0.96714, -0.74944, -0.60531,
         -0.70378]],
        [[0.80041, 1.71571, -0.5634, 0.57047, -2.35215, 1.55785, 2.79528, 2.11604, 1.71636],
         [-0.67517, -0.04405, 0.36063, -0.03939, -1.15241, 0.85503, 1.7407, 1.51769, 1.36516],
         [-1.39756, -0.59941, 0.99377, -0.88357, -0.22453, 1.3044, 1.02722, 0.39619, 0.19724]],
        [[1.20373, -1.03764, 1.30099, -1.01211, 2.40758, -1.81298, -2.90063, -1.74988,
         -1.06499], [1.49834, 0.19604, -1.02177, 0.98666, 0.47703, -1.71985, -1.29661, -0.41329,
         -0.12501], [-2.7033, -3.72831, 0.23928, 0.29316, 2.14981, -2.84513, -2.48253, -0.8284,
         -0.18511]],
        [[0.80041, 1.71571, -0.5634, 0.57047, -2.35215, 1.55785, 2.79528, 2.11604, 1.71636],
         [-0.69475, -1.83861, 3.63023, -3.23517, 3.02963, 0.436, -2.31813, -2.44675, -2.07335],
         [-1.5896, -1.03528, 1.81491, -1.68312, 0.68487, 1.30755, 0.19029, -0.44367, -0.51779]],
    ],
    ('grouped', 'two'): [
        [[1.07494, -2.06092, 2.09062, -1.3692, 2.99612, -2.39967, -3.27952, -1.61689, -0.70242],
         [1.36899, 0.10824, -1.51176, 1.43645, 0.15643, -1.76503, -0.96801, -0.12844, 0.05929],
         [-0.99145, -2.85783, 0.35936, 0.23686, 2.31143, -3.41712, -3.0005, -0.83443, 0.08747]],
        [[0.80041, 1.71571, -0.5634, 0.57047, -2.35215, 1.55785, 2.79528, 2.11604, 1.71636],
         [-0.08356, -1.59193, 3.40471, -2.9148, 2.87371, 0.13088, -2.33184, -2.31325, -1.93832],
         [-1.20139, -2.14406, 1.90711, -1.48924, 2.71397, -1.48769, -2.9192, -1.99922,
         -1.3907]],
    ],}


def wave(shape, i, scale):
    """Weights that depend on no random generator."""
    n = int(np.prod(shape))
    return (scale * torch.sin(0.7 * torch.arange(n).double() ** 1.1 + i)).view(shape).float()


def original(sizes):
    """(LLaVA's state dict, CLIP's state dict) under the names in which they are published."""
    V, D, L, H, K, M, S, P, W, B, _ = sizes
    linear = lambda name, out, into, bias=True: {f"{name}.weight": (out, into)} | (
        {f"{name}.bias": (out,)} if bias else {})
    llava = {"model.embed_tokens.weight": (V, D), "lm_head.weight": (V, D),
             "model.norm.weight": (D,)}
    for layer in (f"model.layers.{i}" for i in range(L)):
        for name, out, into in (("self_attn.q_proj", D, D), ("self_attn.k_proj", D // H * K, D),
                                ("self_attn.v_proj", D // H * K, D), ("self_attn.o_proj", D, D),
                                ("mlp.gate_proj", M, D), ("mlp.up_proj", M, D),
                                ("mlp.down_proj", D, M)):
            llava |= linear(f"{layer}.{name}", out, into, bias=False)
        llava |= {f"{layer}.input_layernorm.weight": (D,),
                  f"{layer}.post_attention_layernorm.weight": (D,)}
    llava |= linear("model.mm_projector.0", D, W) | linear("model.mm_projector.2", D, D)
    clip = {"embeddings.class_embedding": (W,), "embeddings.patch_embedding.weight": (W, 3, P, P),
            "embeddings.position_embedding.weight": (1 + (S // P) ** 2, W)}
    for name in ("pre_layrnorm", "post_layernorm"):
        clip |= {f"{name}.weight": (W,), f"{name}.bias": (W,)}
    for layer in (f"encoder.layers.{i}" for i in range(B)):
        for name in ("layer_norm1", "layer_norm2"):
            clip |= {f"{layer}.{name}.weight": (W,), f"{layer}.{name}.bias": (W,)}
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            clip |= linear(f"{layer}.self_attn.{name}", W, W)
        clip |= linear(f"{layer}.mlp.fc1", 2 * W, W) | linear(f"{layer}.mlp.fc2", W, 2 * W)
    clip = {f"vision_model.{name}": shape for name, shape in clip.items()}
    return tuple({name: 1 + wave(shape, i, 0.2) if "norm" in name and name.endswith("weight")
                  else wave(shape, i, 0.4) for i, (name, shape) in enumerate(shapes.items())}
                 for shapes in (llava, clip))


def text_config(sizes):
    V, D, L, H, K, M = sizes[:6]
    return dict(vocab_size=V, hidden_size=D, num_hidden_layers=L, num_attention_heads=H,
                num_key_value_heads=K, intermediate_size=M, rms_norm_eps=1e-5, rope_theta=10000.0)


def vision_config(sizes):
    S, P, W, B, H = sizes[6:]
    return dict(image_size=S, patch_size=P, hidden_size=W, num_hidden_layers=B,
                num_attention_heads=H, intermediate_size=2 * W, hidden_act="quick_gelu")


def write(folder, sizes, inside=False, projector=False, shards=2, **said):
    """FOLDER/llava and FOLDER/clip as published; the full CLIP has a text part too."""
    llava, clip = original(sizes)
    (folder / "llava").mkdir(parents=True)
    (folder / "clip").mkdir()
    if inside:                       # a tower that was trained along: other weights than CLIP's
        llava |= {f"model.vision_tower.vision_tower.{k}": t for k, t in clip.items()}
        clip = {k: t + 1 for k, t in clip.items()}
    if projector:
        part = {k: llava.pop(k) for k in list(llava) if "mm_projector" in k}
        torch.save(part, folder / "mm_projector.bin")
    clip |= {"text_model.embeddings.token_embedding.weight": torch.ones(3, 2),
             "vision_model.embeddings.position_ids": torch.arange(3), "logit_scale": torch.ones(())}
    torch.save(clip, folder / "clip" / "pytorch_model.bin")
    config = {"model_type": "clip", "vision_config": vision_config(sizes)}
    (folder / "clip" / "config.json").write_text(json.dumps(config))
    names = [f"pytorch_model-{i:05}-of-{shards:05}.bin" for i in range(1, shards + 1)]
    where = {key: names[i * shards // len(llava)] for i, key in enumerate(llava)}
    for name in names:
        torch.save({k: t for k, t in llava.items() if where[k] == name}, folder / "llava" / name)
    (folder / "llava" / "pytorch_model.bin.index.json").write_text(
        json.dumps({"weight_map": where}))
    config = {"model_type": "llava", "mm_projector_type": "mlp2x_gelu", "image_aspect_ratio": "pad",
              "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch",
              "mm_use_im_start_end": False, "mm_use_im_patch_token": False, "mm_hidden_size":
              sizes[8], "mm_vision_tower": "openai/clip-vit-large-patch14-336"}
    (folder / "llava" / "config.json").write_text(json.dumps(text_config(sizes) | config | said))
    return folder / "llava", folder / "clip"


def pictures(sizes, count):
    S = sizes[6]
    return torch.sin(0.37 * torch.arange(count * 3 * S * S)).view(count, 3, S, S)


def batch(sizes, rows):
    """(images, tokens padded with 0 on the right)"""
    T = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (T - len(row)) for row in rows])
    return pictures(sizes, sum(row.count(I) for row in rows)), tokens


def with_transformers(sizes, rows):
    """Logits of each row by itself, from transformers."""
    from transformers import (CLIPVisionConfig, LlamaConfig, LlavaConfig,
                              LlavaForConditionalGeneration)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision_config(sizes)),
        text_config=LlamaConfig(**text_config(sizes)), image_token_index=sizes[0] - 1,
        projector_hidden_act="gelu", vision_feature_layer=-2,
        vision_feature_select_strategy="default", attn_implementation="eager")
    model, (llava, clip) = LlavaForConditionalGeneration(config).eval(), original(sizes)
    state = {"lm_head.weight": llava["lm_head.weight"]}
    for key, tensor in llava.items():
        key = key.removeprefix("model.")
        if key.startswith("mm_projector"):
            key = key.replace("mm_projector.0", "linear_1").replace("mm_projector.2", "linear_2")
            state[f"model.multi_modal_projector.{key}"] = tensor
        elif key != "lm_head.weight":
            state[f"model.language_model.{key}"] = tensor
    theirs = model.state_dict()
    for key, tensor in clip.items():
        key = f"model.vision_tower.{key}"
        state[key if key in theirs else key.replace("vision_model.", "")] = tensor
    model.load_state_dict(state)
    images, result, at = pictures(sizes, sum(row.count(I) for row in rows)), [], 0
    P = (sizes[6] // sizes[7]) ** 2
    for row in rows:                 # its processor writes the image token once for each patch
        ids = sum(([sizes[0] - 1] * P if token == I else [token] for token in row), [])
        assert row.count(sizes[0] - 1) == 0
        with torch.no_grad():
            pixels = images[at:at + row.count(I)] if I in row else None
            result.append(model(input_ids=torch.tensor([ids]), pixel_values=pixels).logits[0])
        at += row.count(I)
    return result


# --- model and checkpoints


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("size", SIZES)
def test_logits_are_those_of_transformers(tmp_path, size, prompt):
    rows, sizes = PROMPTS[prompt], SIZES[size]
    model = load_llava(*write(tmp_path, sizes), torch.float32)
    logits = model(*batch(sizes, rows))
    P = (sizes[6] // sizes[7]) ** 2
    assert logits.shape == (len(rows), max(len(r) + (P - 1) * r.count(I) for r in rows), sizes[0])
    for n, row in enumerate(rows):
        last = len(row) + (P - 1) * row.count(I) - 1
        expected = torch.tensor(EXPECTED[size, prompt][n])
        torch.testing.assert_close(logits[n, [0, last // 2, last]], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", SIZES)
def test_every_logit_against_transformers_itself(tmp_path, size):
    pytest.importorskip("transformers")
    rows, sizes = PROMPTS["mixed"], SIZES[size]
    logits = load_llava(*write(tmp_path, sizes), torch.float32)(*batch(sizes, rows))
    for mine, theirs in zip(logits, with_transformers(sizes, rows)):
        torch.testing.assert_close(mine[:len(theirs)], theirs, atol=1e-4, rtol=1e-4)


def test_a_tower_inside_llavas_files_wins_over_clips(tmp_path):
    sizes, rows = SIZES["plain"], PROMPTS["mixed"]
    apart = load_llava(*write(tmp_path / "a", sizes), torch.float32)
    inside = load_llava(*write(tmp_path / "b", sizes, inside=True), torch.float32)
    assert torch.equal(apart(*batch(sizes, rows)), inside(*batch(sizes, rows)))


def test_a_projector_of_its_own_file(tmp_path):
    sizes, rows = SIZES["plain"], PROMPTS["mixed"]
    whole = load_llava(*write(tmp_path / "a", sizes), torch.float32)
    llava, clip = write(tmp_path / "b", sizes, projector=True)
    with pytest.raises(InputError, match="mm_projector"):
        load_llava(llava, clip)
    apart = load_llava(llava, clip, torch.float32, projector=tmp_path / "b" / "mm_projector.bin")
    assert torch.equal(apart(*batch(sizes, rows)), whole(*batch(sizes, rows)))


def test_the_layer_that_is_read_is_the_one_that_config_json_names(tmp_path):
    sizes = SIZES["plain"]                                       # a tower of three layers
    for layer, depth in ((-2, 2), (-1, 3), (1, 1)):
        model = load_llava(*write(tmp_path / str(layer), sizes, mm_vision_select_layer=layer))
        assert len(model.model.vision_tower.blocks) == depth


def test_select_speaks_of_tokens_and_gives_what_follows_them(tmp_path):
    sizes, rows = SIZES["plain"], [[1, I, 4, 5], [I, 2, 3, 6]]
    model = load_llava(*write(tmp_path, sizes), torch.float32)
    images, tokens = batch(sizes, rows)
    logits, P = model(images, tokens), 9
    select = torch.tensor([[True, True, False, True], [True, False, True, False]])
    places = [(0, 0), (0, P), (0, P + 2), (1, P - 1), (1, P + 1)]                # last of a picture
    expected = torch.stack([logits[place] for place in places])
    assert torch.allclose(model(images, tokens, select=select), expected, atol=1e-5)


def test_rows_of_different_lengths_are_answered_as_each_by_itself(tmp_path):
    sizes, rows = SIZES["plain"], PROMPTS["mixed"]
    model = load_llava(*write(tmp_path, sizes), torch.float32)
    images, T, at = pictures(sizes, 3), max(map(len, rows)), 0
    tokens = torch.tensor([[0] * (T - len(row)) + row for row in rows])
    real = torch.tensor([[False] * (T - len(row)) + [True] * len(row) for row in rows])
    embeddings, _, seen = model.splice(images, tokens, real)
    fill = tokens.new_zeros(seen.shape)
    together = train_llama.generate(model, fill, 8, real=seen, embeddings=embeddings)
    for n, row in enumerate(rows):
        mine = images[at:at + row.count(I)] if I in row else None
        at += row.count(I)
        alone, _, _ = model.splice(mine, torch.tensor([row]))
        out = train_llama.generate(model, fill[:1, :alone.shape[1]], 8, embeddings=alone)
        assert torch.equal(out[0, -8:], together[n, -8:])


def test_merged_weights_and_llavas_layout_are_read_as_they_were_written(tmp_path):
    sizes, rows = SIZES["grouped"], PROMPTS["mixed"]
    model = load_llava(*write(tmp_path / "a", sizes), torch.float32)
    expected = model(*batch(sizes, rows))
    train_llava.save_merged(model, tmp_path / "merged.pt")
    merged = load_llava(tmp_path / "merged.pt", None, torch.float32)
    assert torch.equal(merged(*batch(sizes, rows)), expected) and merged.view == model.view
    train_llava.save_llava(model, tmp_path / "b")
    again = load_llava(tmp_path / "b/llava", tmp_path / "b/clip", torch.float32)
    assert torch.equal(again(*batch(sizes, rows)), expected)


def test_language_model_and_tower_are_different_graphs(tmp_path):
    folders = write(tmp_path, SIZES["plain"])
    for vision, kinds in ((False, 2), (True, 4)):
        targets = train_llava.qualified("q_proj,v_proj", vision)
        adapters = attach(load_llava(*folders), Config(rank=2, targets=targets))
        assert len(adapters.graphs) == kinds
        assert any("vision_tower" in name for name in adapters.layers) == vision
        assert all(len({"vision_tower" in name for name in g.names}) == 1 for g in adapters.graphs)
    assert train_llava.qualified("gate_proj", True) == ["gate_proj"]


@pytest.mark.parametrize("images, rows, words", (
    (0, [[1, I, 2]], "0 images for 1 image tokens"), (1, [[1, 2]], "1 images for 0 image tokens"),
    (3, [[I, I]], "3 images for 2")))
def test_pictures_and_their_tokens_must_agree_in_number(images, rows, words, tmp_path):
    sizes = SIZES["plain"]
    model = load_llava(*write(tmp_path, sizes), torch.float32)
    with pytest.raises(InputError, match=words):
        model(pictures(sizes, images) if images else None, torch.tensor(rows))


def test_pictures_of_another_size_are_refused(tmp_path):
    model = load_llava(*write(tmp_path, SIZES["plain"]), torch.float32)
    with pytest.raises(InputError, match="12, 12"):
        model(torch.zeros(1, 3, 14, 14), torch.tensor([[1, I]]))


def refused(words, *arguments, **named):
    with pytest.raises(InputError) as error:
        load_llava(*arguments, **named)
    assert words in str(error.value) and "\n" not in str(error.value), error.value


def test_bad_checkpoints_are_refused_by_name(tmp_path):
    sizes = SIZES["plain"]
    llava, clip = write(tmp_path / "a", sizes)
    refused("--vision-checkpoint", llava)
    refused("absent", llava, tmp_path / "absent")
    refused("absent", tmp_path / "absent", clip)
    whole = (clip / "pytorch_model.bin").read_bytes()
    (clip / "pytorch_model.bin").write_bytes(whole[:len(whole) // 2])
    refused("pytorch_model.bin", llava, clip)
    state = torch.load(write(tmp_path / "b", sizes)[1] / "pytorch_model.bin")
    cut = {k: v for k, v in state.items() if "layers.2" not in k}
    torch.save(cut, clip / "pytorch_model.bin")
    refused("2 of the 3 layers", llava, clip)
    torch.save(state | {"vision_model.pre_layrnorm.bias": torch.full((12,), float("nan"))},
               clip / "pytorch_model.bin")
    refused("NaN", llava, clip)
    (clip / "config.json").write_text(json.dumps({"vision_config": vision_config(sizes)
                                                  | {"hidden_act": "gelu"}}))
    refused("quick_gelu", llava, clip)
    torch.save({"model.mm_projector.0.weight": torch.ones(16, 11)}, tmp_path / "mm.bin")
    llava, clip = tmp_path / "b/llava", tmp_path / "b/clip"
    refused("mm_projector.0.weight is [16, 11], expected [16, 12]", llava, clip,
            projector=tmp_path / "mm.bin")
    torch.save({"other": torch.ones(1)}, tmp_path / "mm.bin")
    refused("no part of a projector", llava, clip, projector=tmp_path / "mm.bin")
    for n, (key, value) in enumerate((("mm_projector_type", "linear"),
                                      ("mm_vision_select_layer", 9),
                                      ("mm_use_im_start_end", True))):
        refused(key, *write(tmp_path / f"c{n}", sizes, **{key: value}))


# --- data


def conversation(name, *texts, image=True):
    turns = [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts)]
    return ({"image": name} if image else {}) | {"id": "0", "conversations": turns}


def put_picture(folder, name, seed=0, shape=(6, 8, 3)):
    folder.mkdir(exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    H, W, _ = shape
    (folder / name).write_bytes(b"P6\n# a comment\n%d %d\n255\n" % (W, H) + pixels.tobytes())
    return pixels


def test_conversations_keep_their_order_and_the_picture_comes_first(tmp_path):
    put_picture(tmp_path, "a.ppm")
    records = [conversation("a.ppm", "What is it?\n<image>", "A cat.", "Sure?", "Yes, it is so."),
               conversation("", "Say hi.", "hi", image=False),
               conversation("a.ppm", "<image>\n And this? ", "a")]
    (tmp_path / "a.json").write_text(json.dumps(records))
    first, second, third = train_llava.read_examples([tmp_path / "a.json"], tmp_path)
    assert first.turns == [("<image>\nWhat is it?", "A cat."), ("Sure?", "Yes, it is so.")]
    assert first.image == tmp_path / "a.ppm" and first.kind == "question"
    assert second.image is None and second.turns == [("Say hi.", "hi")]
    assert third.turns == [("<image>\nAnd this?", "a")]
    assert third.references == ["a"] * 10            # one answer counts as ten who agree


def test_coco_captions_share_their_pictures_references(tmp_path):
    put_picture(tmp_path / "train2014", "a.ppm")                 # found in a folder below
    (tmp_path / "captions.json").write_text(json.dumps(
        {"images": [{"id": 7, "file_name": "a.ppm"}], "annotations": [
            {"image_id": 7, "id": 1, "caption": "One cat. "}, {"image_id": 7, "id": 2, "caption":
                                                              "A cat."}]}))
    first, second = train_llava.read_examples([tmp_path / "captions.json"], tmp_path)
    assert first.turns[0][1] == "One cat." and second.turns[0][1] == "A cat."
    assert first.references == second.references == ["One cat.", "A cat."]
    assert first.kind == "caption" and first.image == tmp_path / "train2014/a.ppm"


def test_vqa_questions_find_their_answers_in_the_file_beside_them(tmp_path):
    put_picture(tmp_path, "COCO_val2014_000000000042.ppm")
    (tmp_path / "val_questions.json").write_text(json.dumps(
        {"data_subtype": "val2014", "questions": [
            {"question_id": 3, "image_id": 42, "question": "What?",
             "image": "COCO_val2014_000000000042.ppm"}]}))
    annotations = {"annotations": [{"question_id": 3, "multiple_choice_answer": "cat",
                                    "answers": [{"answer": w} for w in ("cat", "dog")]}]}
    with pytest.raises(InputError, match="question 3"):
        train_llava.read_examples([tmp_path / "val_questions.json"], tmp_path)
    (tmp_path / "val_annotations.json").write_text(json.dumps(annotations))
    example, = train_llava.read_examples([tmp_path / "val_questions.json"], tmp_path)
    assert example.references == ["cat", "dog"] and example.turns[0][1] == "cat"
    assert example.turns[0][0] == ("<image>\nWhat?\nAnswer the question using a single word or "
                                   "phrase.")


def test_pictures_of_all_kinds_give_their_pixels(tmp_path):
    pixels = put_picture(tmp_path, "a.ppm")
    np.save(tmp_path / "a.npy", pixels)
    kinds = ["a.ppm", "a.npy"]
    try:
        from PIL import Image
        Image.fromarray(pixels).save(tmp_path / "a.png")
        kinds.append("a.png")
    except ImportError:
        pass
    for name in kinds:
        assert np.array_equal(train_llava.read_picture(tmp_path / name).permute(1, 2, 0), pixels)
    for name, content in (("b.ppm", b"P6 4 4 255\nxx"), ("c.ppm", b""), ("d.npy", b"\x93NUMPY")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=name):
            train_llava.read_picture(tmp_path / name)
    np.save(tmp_path / "e.npy", pixels / 2)
    with pytest.raises(InputError, match="e.npy.*float64"):
        train_llava.read_picture(tmp_path / "e.npy")


def test_pictures_are_padded_with_the_mean_colour_or_cropped():
    pixels = torch.randint(0, 256, (3, 4, 8), dtype=torch.uint8)
    padded = fit(pixels, 8, pad=True)
    assert torch.equal(padded[:, 2:6], pixels)
    assert padded[:, 0, 0].tolist() == padded[:, 7, 5].tolist() == [122, 116, 104]
    assert torch.equal(fit(pixels, 4, pad=False), pixels[:, :, 2:6])             # centre crop
    assert torch.equal(fit(pixels[:, :, :4], 4, pad=True), pixels[:, :, :4])


@pytest.mark.parametrize("shape", ((40, 30), (23, 57), (16, 16)))
def test_resizing_is_that_of_clips_processor(shape):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("PIL")
    pixels = np.random.default_rng(1).integers(0, 256, (*shape, 3), dtype=np.uint8)
    try:
        processor = transformers.CLIPImageProcessorPil
    except AttributeError:
        processor = transformers.CLIPImageProcessor
    processor = processor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    theirs = torch.as_tensor(np.array(processor(pixels)["pixel_values"][0]))
    mine = fit(torch.from_numpy(pixels.transpose(2, 0, 1).copy()), 16, pad=False)
    mean, std = (torch.tensor(v)[:, None, None] for v in (train_llava.CLIP_MEAN,
                                                          train_llava.CLIP_STD))
    assert ((mine / 255 - mean) / std - theirs).abs().max() < 0.02               # one of 256 steps


class Letters:
    """A token per character; a tokenizer whose ids can be read."""
    bos_id, eos_id, vocab_size = 1, 2, 300

    def encode(self, text, bos=True, eos=False):
        return [1] * bos + [ord(c) for c in text] + [2] * eos

    def decode(self, ids):
        return "".join(chr(i) for i in ids if i > 2)


def test_the_prompt_is_vicunas_and_only_answers_are_learned():
    example = Example(None, "", [("<image>\nA?", "cat"), ("B?", "dog")], ["cat"], "question")
    row = encode(Letters(), example._replace(image=torch.zeros(3, 12, 12, dtype=torch.uint8)), 999)
    text = "".join("<image>" if i == I else {1: "<s>", 2: "</s>"}.get(i, chr(max(i, 0)))
                   for i in row.tokens)
    assert text == ("<s>A chat between a curious user and an artificial intelligence assistant. "
                    "The assistant gives helpful, detailed, and polite answers to the user's "
                    "questions. USER: <image>\nA? ASSISTANT: cat</s>USER: B? ASSISTANT: dog</s>")
    vision = train_llava.vit.ViTConfig(12, 4, 8, 1, 1, 8)
    _, tokens, answers = collate([row], (vision, True), "cpu")
    learned = "".join({2: "$"}.get(i, chr(max(i, 0))) for i in tokens[0][answers[0]].tolist())
    assert learned == " cat$ dog$" and not answers[0, 0]
    asked = encode(Letters(), example, 999, answered=False)
    assert asked.tokens == row.tokens[:row.start]


def test_empty_questions_ask_for_no_picture_and_empty_answers_are_learned():
    record = conversation("", "", "Hi", "", "", image=False)
    row = encode(Letters(), train_llava.parse_conversation(record, "a.json"), 999)
    assert I not in row.tokens and row.tokens[-3:] == [ord(":"), ord(" "), 2]
    first = Example(None, "a.ppm", [(None, "a cat")], [], "caption")             # LLaVA's stage 1
    assert encode(Letters(), first, 999).tokens == [1, I, ord(" "), *map(ord, "a cat"), 2]


def test_a_conversation_whose_answer_does_not_fit_is_left_out():
    short = Example(None, "", [("Hi", "Ho")], ["Ho"], "question")
    long = short._replace(image=torch.zeros(3, 4, 4), turns=[("<image>\n" + "why " * 99, "No")])
    args = argparse.Namespace(max_length=300, seed=0, device="cpu")
    view = train_llava.vit.ViTConfig(12, 4, 8, 1, 1, 8), True
    task = train_llava.make_task([short, long], [short], Letters(), view, args, 4)
    assert task.num_examples == len(" Ho") + 1
    with pytest.raises(InputError, match="--max-length 300: no answer"):
        train_llava.make_task([short], [long], Letters(), view, args, 4)


def test_llavas_way_of_tokenising_around_the_picture():
    model = Path(__file__).parents[2] / "shared/data/llama2/tokenizer.model"
    if not model.is_file():
        pytest.skip("the shared data is not here")
    example = Example(None, "", [("<image>\nIs it red?", "Yes")], ["Yes"], "question")
    tokens = encode(train_llama.load_tokenizer(model), example, 99).tokens
    at = tokens.index(I)             # by sentencepiece, each side by itself: "▁" before "\n"
    assert tokens[:2] == [1, 319] and tokens[at - 4:at] == [3148, 1001, 29901, 29871]
    assert tokens[at + 1:at + 7] == [29871, 13, 3624, 372, 2654, 29973]
    assert tokens[-2:] == [3869, 2]


# --- the command line


@pytest.fixture
def cli(monkeypatch, capsys, tmp_path):
    """Runs train_llava.py in this process, with few scenes -> (status, stdout, stderr)."""
    def call(*arguments):
        monkeypatch.setattr("sys.argv", ["train_llava.py", *map(str, arguments)])
        monkeypatch.setattr(train_llava, "SCENES", {"pretrain": 12, "adapt": 10, "val": 6})
        monkeypatch.chdir(tmp_path)
        try:
            status = structlora.run(train_llava.main)
        except SystemExit as end:                                # argparse
            status = end.code
        printed = capsys.readouterr()
        return status, printed.out, printed.err
    return call


QUICK = ("--pretrain-steps", "2", "--steps", "4", "--batch-size", "4", "--max-new-tokens", "4",
         "--device", "cpu", "--out", "out")


def test_the_demo_runs_resumes_and_scores(cli, tmp_path):
    status, out, err = cli(*QUICK)
    assert status == 0 and not err and out.count("VQA accuracy before") == 1
    assert all(name in out for name in ("LoRA r=2", "(matched)", "StructLoRA r=2", "CIDEr after"))
    metrics = (tmp_path / "out/structlora/metrics.jsonl").read_text()
    last = json.loads(metrics.splitlines()[-1])
    assert {"loss", "accuracy", "cider"} < last.keys()
    status, out, _ = cli(*QUICK, "--resume")
    assert status == 0 and "using the backbone" in out
    assert (tmp_path / "out/structlora/metrics.jsonl").read_text() == metrics
    status, out, _ = cli(*QUICK, "--eval-only")
    assert status == 0 and f"{last['loss']:.4f}" in out


def test_a_checkpoint_is_adapted_merged_and_read_again(cli, tmp_path):
    assert cli(*QUICK)[0] == 0
    model = load_llava(tmp_path / "out/backbone/llava", tmp_path / "out/backbone/clip")
    tokenizer = tmp_path / "tok.model"
    tokenizer.write_bytes(sentencepiece_model([]))               # a SentencePiece model of bytes
    config = replace(model.config, vocab_size=259)
    big = train_llava.Llava(config, *model.view).initialise()
    train_llava.save_llava(big, tmp_path / "ck")
    common = ("--data", tmp_path / "out/demo/adapt", "--images", tmp_path / "out/demo/scenes",
              "--tokenizer", tokenizer, "--shots", "4", *QUICK[:-1])
    status, out, err = cli("--checkpoint", "ck/llava", "--vision-checkpoint", "ck/clip", "--merge",
                           "--tune-projector", "--tune-vision", *common, "run")
    assert status == 0 and not err, err
    last = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    trained = torch.load(tmp_path / "run/adapter.pt")["trained"]
    assert len(trained) == 4 and all("mm_projector" in name for name in trained)
    status, out, err = cli("--checkpoint", "run/merged.pt", "--eval-only", *common, "none")
    assert status == 0 and f"{last['loss']:.4f}" in out and not (tmp_path / "none").exists()
    (tmp_path / "out/demo/scenes/val0001.ppm").unlink()
    status, _, err = cli("--checkpoint", "ck/llava", "--vision-checkpoint", "ck/clip", *common,
                         "no")
    assert status == 2 and "val0001.ppm" in err and err.count("\n") == 1
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("arguments, word", (
    (("--checkpoint", "absent"), "--data"), (("--data", "absent"), "absent"),
    (("--projector", "p.bin"), "--checkpoint"), (("--rank", "99", *QUICK), "rank"),
    (("--checkpoint", "absent", "--data", "absent"), "absent")))
def test_a_mistake_is_one_line_and_status_two(arguments, word, cli, tmp_path):
    status, _, err = cli(*arguments)
    assert status == 2 and word in err and err.count("\n") == 1


@pytest.mark.parametrize("record, words", (
    (conversation("a.ppm", "no picture", "answer"), "record 2: 0 times <image> with an image"),
    (conversation("", "<image>", "answer", image=False), "record 2: 1 times <image> with no image"),
    (conversation("a.ppm", "<image>a", "b", "c"), "record 2: expected human and gpt"),
    (conversation("absent.ppm", "<image>a", "b"), "absent.ppm: no such picture"),
    ({"image": "a.ppm"}, "a.json: a record is damaged"), ([], "a.json: a record is damaged")))
def test_a_bad_record_is_named(record, words, tmp_path):
    put_picture(tmp_path, "a.ppm")
    (tmp_path / "a.json").write_text(json.dumps([conversation("a.ppm", "<image>a", "b"), record]))
    with pytest.raises(InputError) as error:
        read_data(tmp_path / "a.json", tmp_path, 0)
    assert words in str(error.value) and "\n" not in str(error.value)


# --- more checkpoints


def tiny(tmp_path, size="plain", **more):
    return load_llava(*write(tmp_path / "tiny", SIZES[size], **more), torch.float32)


def test_gradients_reach_projector_and_tower_through_the_splice(tmp_path):
    model, (images, tokens) = tiny(tmp_path), batch(SIZES["plain"], PROMPTS["mixed"])
    adapters = attach(model, Config(rank=1, targets=["attn.q_proj"]))
    model.get_submodule("model.mm_projector").requires_grad_(True)
    model(images, tokens)[:3].square().sum().backward()
    assert adapters.graphs[0].B.grad.abs().sum() > 0
    assert all(p.grad.abs().sum() > 0 for p in model.model.mm_projector.parameters())


def test_a_plain_llama_with_a_projector_and_without_an_index(tmp_path):
    sizes, (images, tokens) = SIZES["plain"], batch(SIZES["plain"], PROMPTS["one"])
    expected = tiny(tmp_path)(images, tokens)
    llava, clip = write(tmp_path / "b", sizes, projector=True)
    (llava / "pytorch_model.bin.index.json").unlink()
    (llava / "config.json").write_text(json.dumps(text_config(sizes)))           # says no mm_*
    model = load_llava(llava, clip, torch.float32, projector=tmp_path / "b/mm_projector.bin")
    assert torch.equal(model(images, tokens), expected)


def test_a_merged_llama_is_no_llava(tmp_path):
    train_llama.save_merged(tiny(tmp_path), tmp_path / "merged.pt")
    with pytest.raises(InputError, match="merged.pt: holds no LLaVA"):
        load_llava(tmp_path / "merged.pt")


def spoil(path, change):
    state = torch.load(path, weights_only=True)
    torch.save({k: v for k, v in ((k, change(k, t)) for k, t in state.items()) if v is not None},
               path)


def drop(part):
    return lambda folder: spoil(folder / "clip/pytorch_model.bin",
                                lambda key, tensor: None if part in key else tensor)


BAD = {  # what is wrong: (what is done to the folder, what the line must say)
    "no projector's file": (lambda d: (d / "mm_projector.bin").unlink(),
                            "mm_projector.bin: no such file"),
    "a tower without a weight": (drop("1.mlp.fc1.bias"),
                                 "no weights for model.vision_tower.blocks.1.fc1.bias"),
    "no vision part": (drop("vision_model."), "clip.pytorch_model.bin"),
    "an unknown weight": (
        lambda d: torch.save({"vision_model.strange": torch.ones(1)}, d / "clip/pytorch_model.bin"),
        "clip.pytorch_model.bin: strange is no part"),
    "safetensors only": (
        lambda d: (d / "clip/pytorch_model.bin").rename(d / "clip/model.safetensors"),
        "clip: holds safetensors only"),
    "a missing shard": (
        lambda d: (d / "llava/pytorch_model-00002-of-00002.bin").unlink(),
        "00002-of-00002.bin: no such file"),
    "another picture layout": (lambda d: said(d, image_aspect_ratio="anyres"),
                               "image_aspect_ratio = 'anyres' is not supported")}


def said(folder, part="llava", **values):
    path = folder / part / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("case", BAD)
def test_a_bad_checkpoint_is_refused_by_name_in_one_line(tmp_path, case):
    folder, clip = write(tmp_path / "x", SIZES["plain"], projector=True)
    change, message = BAD[case]
    change(tmp_path / "x")
    with pytest.raises(InputError, match=message) as caught:
        load_llava(folder, clip, torch.float32, projector=tmp_path / "x/mm_projector.bin")
    assert "\n" not in str(caught.value)


# --- more data


def test_a_text_without_a_picture_and_one_that_is_cut():
    example = Example(None, "", [("Hello", "Hi")], ["Hi"], "question")
    row = encode(Letters(), example, 4096)
    assert row.tokens == [1, *map(ord, f"{train_llava.SYSTEM}USER: Hello ASSISTANT: Hi"), 2]
    assert len(encode(Letters(), example, 30).tokens) == 30
    assert collate([row], (None, True), "cpu")[0] is None


def write_images(folder, *names, size=(6, 8)):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    result = []
    for name in names:
        pixels = rng.integers(0, 256, (*size, 3)).astype(np.uint8)
        if name.endswith(".npy"):
            np.save(folder / name, pixels)
        else:
            (folder / name).write_bytes(b"P6\n# a comment\n%d %d\n255\n" % (size[1], size[0])
                                        + pixels.tobytes())
        result.append(torch.from_numpy(pixels).permute(2, 0, 1))
    return result


def chat(image, *said):
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(said)]
    return {"id": "1", "image": image, "conversations": turns} if image else {
        "conversations": turns}


def test_a_single_file_holds_out_pictures_not_questions(tmp_path):
    names = [f"{i}.ppm" for i in range(20)]
    write_images(tmp_path, *names, size=(2, 2))
    (tmp_path / "data.json").write_text(json.dumps(
        [chat(name, f"<image>\n{q}?", "x") for q in range(3) for name in names]))
    train, test = read_data(tmp_path / "data.json", None, 0)
    assert len(train) == 54 and len(test) == 6
    assert not {e.name for e in train} & {e.name for e in test}
    assert read_data(tmp_path / "data.json", None, 0)[1] == test
    assert read_data(tmp_path / "data.json", None, 1)[1] != test


@pytest.mark.parametrize("name, data, message", [
    ("x.ppm", b"P5 2 2 255\n" + bytes(4), "P6"), ("x.ppm", b"P6 1 1 65535\n" + bytes(6), "255"),
    ("x.npy", np.zeros((3, 4, 4), np.uint8), r"uint8 \[3, 4, 4\], expected uint8 \[H, W, 3\]"),
    ("x.npy", np.zeros((0, 4, 3), np.uint8), r"\[0, 4, 3\]"), ("x.jpg", b"junk", "identify")],
    ids=["grey", "sixteen bits", "channel first", "empty", "no JPEG"])
def test_a_bad_picture_is_named(tmp_path, name, data, message):
    if name.endswith("jpg"):
        pytest.importorskip("PIL")
    if isinstance(data, bytes):
        (tmp_path / name).write_bytes(data)
    else:
        np.save(tmp_path / name, data)
    with pytest.raises(InputError, match=f"{name}: not a readable picture.*{message}"):
        read_picture(tmp_path / name)


def test_without_pillow_the_error_names_it(tmp_path, monkeypatch):
    (tmp_path / "a.jpg").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(InputError, match="a.jpg: reading it needs Pillow: pip install pillow"):
        train_llava.find_picture(tmp_path, "a.jpg", tmp_path)


def test_normalisation_is_clips(tmp_path):
    write_images(tmp_path, "a.ppm", size=(12, 12))
    view = tiny(tmp_path).view
    row = train_llava.Row([1], 1, [], tmp_path / "a.ppm")
    images = train_llava.load_images([row, row._replace(image=None)], view, "cpu")
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    expected = (read_picture(tmp_path / "a.ppm") / 255 - mean) / std
    torch.testing.assert_close(images, expected[None])


@pytest.mark.parametrize("content, message", [
    ("[{", "train.json: not readable as JSON"), ("3", "train.json: expected LLaVA's conversations"),
    ([chat("a.ppm", "<image> <image>", "x")], "record 1: 2 times <image> with an image"),
    ([chat("a.ppm", "ok", "<image>")], "record 1: 1 times <image>"),
    ({"images": [], "annotations": [{"image_id": 5, "caption": "x"}]}, "KeyError: 5"),
    ({"questions": [{"question_id": 1, "image": "a.ppm", "question": "?"}]},
     "no annotation answers question 1"),
    ({"questions": [{"question_id": 1, "image": "a.ppm", "question": "?"}], "annotations": [
        {"question_id": 1, "multiple_choice_answer": "x", "answers": []}]}, "a.ppm has no answers"),
    ({"images": [{"id": 5, "file_name": "a.ppm"}], "annotations": [
        {"image_id": 5, "caption": "an <image>"}]}, "a.ppm has no answers, or its text says")])
def test_bad_files_are_named(tmp_path, content, message):
    write_images(tmp_path, "a.ppm")
    (tmp_path / "val.json").write_text(json.dumps([chat("a.ppm", "<image>", "x")]))
    (tmp_path / "train.json").write_text(content if isinstance(content, str)
                                         else json.dumps(content))
    with pytest.raises(InputError, match=message) as caught:
        read_data(tmp_path, None, 0)
    assert "\n" not in str(caught.value)


def test_scenes_say_what_they_show():
    """The colour that a question asks for is the one painted, on the side the caption says."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        pixels, facts = train_llava.draw_scene(rng)
        assert pixels.shape == (32, 32, 3) and facts[0][1] != facts[1][1]
        for side, (colour, shape) in enumerate(facts):
            half = pixels[:, 16 * side:16 * side + 16].reshape(-1, 3).astype(int)
            bright = half[half.max(1) > 100].mean(0)
            near = min(train_llava.COLOURS,
                       key=lambda c: np.abs(bright - train_llava.COLOURS[c]).sum())
            assert near == colour
        question, text = train_llava.ask_scene(rng, facts)
        assert any(text in fact for fact in facts)
        assert any(other in question for fact in facts if text in fact for other in fact)


def test_cifar_becomes_captions_and_questions(tmp_path):
    rows = np.zeros((200, 3073), np.uint8)
    rows[:, 0] = np.arange(200) // 5 % 10            # every fifth is asked about: all classes
    for name in ("data_batch_1.bin", "test_batch.bin"):
        rows.tofile(tmp_path / name)
    (captions, held), (train, test) = train_llava.cifar_examples(tmp_path, 0)
    assert len(captions) == 160 and len(held) == 200 and len(train) == len(test) == 80
    assert {e.turns[0][1] for e in captions} >= {"a photo of a cat", "a photo of a truck"}
    assert {e.kind for e in train} == {"question", "caption"}
    assert not {e.name for e in captions} & {e.name for e in train}
    for e in train + test:
        if "fly" in e.turns[0][0]:
            number = int(e.name.split("#")[1]) // 5 % 10
            assert e.references == [("no", "yes")[number in (0, 2)]] * 10


# --- more of the command line


@pytest.fixture
def real(tmp_path):
    """Arguments of a run on files: a LLaVA of 512 tokens with a rank file, pictures, questions."""
    folder, clip = write(tmp_path / "net", (512, *SIZES["plain"][1:]))
    (folder / "tokenizer.model").write_bytes(b"".join(
        base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256)))
    names = [f"{i}.ppm" for i in range(6)]
    write_images(tmp_path / "pictures", *names)
    for part, mine in (("train", names[:4]), ("val", names[4:])):
        (tmp_path / f"{part}.json").write_text(json.dumps(
            [chat(name, f"<image>\nColour?{SHORT}", "red") for name in mine]
            + [chat(name, "<image>\nDescribe.", "a red thing on a table") for name in mine]))
    return ["--checkpoint", folder, "--vision-checkpoint", clip, "--data", tmp_path, "--images",
            tmp_path / "pictures", "--batch-size", 2, "--steps", 2, "--rank", 1,
            "--max-new-tokens", 3, "--lr", 1e-2]


def test_answers_do_not_depend_on_the_batch(tmp_path):
    """Questions of all lengths, with and without a picture, in batches of six and of two."""
    sizes = (300, *SIZES["plain"][1:])
    model, found = load_llava(*write(tmp_path, sizes), torch.float32), []
    pixels = torch.randint(0, 256, (3, 12, 12), generator=torch.Generator().manual_seed(0)).byte()
    ask = lambda n: "<image>\n" * bool(n % 3) + "why " * (1 + n * 5 % 7)
    examples = [Example(pixels.roll(n, 2) if n % 3 else None, str(n), [(ask(n), "")], [],
                        "question") for n in range(6)]
    for size in (3, 1):
        args = argparse.Namespace(max_length=999, max_new_tokens=5, batch_size=size, device="cpu")
        found.append(train_llava.answer(model, Letters(), examples, args))
    assert found[0] == found[1] and len(set(found[0])) >= 3
    alone = train_llava.answer(model, Letters(), examples[4:5], args)
    assert alone == found[0][4:5]


def test_gradient_checkpointing_changes_no_number(cli, real, tmp_path, monkeypatch):
    cli(*real, "--out", "a")
    calls, checkpoint = [], train_llama.checkpoint
    monkeypatch.setattr(train_llama, "checkpoint",
                        lambda *a, **k: calls.append(1) or checkpoint(*a, **k))
    cli(*real, "--out", "b", "--gradient-checkpointing")
    assert len(calls) == 2 * 2                       # steps x layers
    a, b = ((tmp_path / out / "metrics.jsonl").read_text() for out in "ab")
    assert json.loads(a.splitlines()[-1])["loss"] == pytest.approx(
        json.loads(b.splitlines()[-1])["loss"], abs=1e-4)


def test_a_resumed_run_ends_with_the_same_numbers(cli, real, tmp_path):
    cli(*real, "--out", "whole", "--steps", 4, "--save-every", 2)
    whole = (tmp_path / "whole/metrics.jsonl").read_text()
    keep = structlora.save_checkpoint

    def stop(path, adapters, optimizer, extra):
        keep(path, adapters, optimizer, extra)
        raise KeyboardInterrupt("stopped")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(structlora, "save_checkpoint", stop)
        assert cli(*real, "--out", "part", "--steps", 4, "--save-every", 2)[0] == 130
    assert cli(*real, "--out", "part", "--steps", 4, "--save-every", 2, "--resume")[0] == 0
    assert (tmp_path / "part/metrics.jsonl").read_text() == whole


@pytest.mark.parametrize("arguments, message", [
    (["--projector", "gone.bin"], "gone.bin: no such file"),
    (["--vision-checkpoint", "gone"], "gone/config.json: no such file"),
    (["--images", "gone"], "no such picture"), (["--data", "gone"], "gone: no such file"),
    (["--tokenizer", "gone"], "gone: no such file"),
    (["--max-length", 20], "--max-length 20: no answer of the data fits")])
def test_bad_input_is_one_line_and_nothing_is_written(cli, real, tmp_path, arguments, message):
    status, _, err = cli(*real, "--out", "new", *arguments)
    assert status == 2 and err.count("\n") == 1 and message in err
    assert not (tmp_path / "new").exists()


def test_a_picture_that_cannot_be_read_is_found_before_anything_is_written(cli, real, tmp_path):
    (tmp_path / "pictures/1.ppm").write_bytes(b"P6 9 9 255\n123")
    status, _, err = cli(*real, "--out", "new")
    assert status == 2 and err.count("\n") == 1 and "1.ppm: not a readable picture" in err
    assert not (tmp_path / "new").exists()


def print_expected():
    for size, sizes in SIZES.items():
        for name, rows in PROMPTS.items():
            print(f"    {(size, name)!r}: [")
            for logits in with_transformers(sizes, rows):
                rounded = logits[[0, (len(logits) - 1) // 2, -1]].double().numpy().round(5).tolist()
                print(textwrap.fill(f"{rounded},", 96, initial_indent=" " * 8,
                                    subsequent_indent=" " * 9))
            print("    ],")


if __name__ == "__main__":
    print_expected()
