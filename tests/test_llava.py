"""train_llava.py: model and checkpoints against transformers, pictures, prompts, bad input.

The expected logits below were printed by `python tests/test_llava.py`, which needs transformers."""

import json
import textwrap
from dataclasses import replace

import numpy as np
import pytest
import torch

import structlora
import train_llama
import train_llava
from structlora import Config, InputError, attach
from train_llava import IMAGE_TOKEN, Example, collate, encode, fit, load_llava, read_data

torch.set_num_threads(1)
# vocabulary, width, layers, heads, key-value heads, SwiGLU | picture, patch, width, layers, heads
SIZES = {"plain": (11, 16, 2, 2, 2, 24, 12, 4, 12, 3, 2),
         "grouped": (9, 24, 1, 4, 2, 20, 10, 5, 8, 2, 1)}
I = IMAGE_TOKEN
PROMPTS = {"one": [[1, 3, I, 4, 5]],
           "mixed": [[I, 2, 3], [1, 5, 3, I, 2, 6, 4], [4, 2, 1, 6, 3, I], [1, 2, 3, 4]]}
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
    llava = {"model.embed_tokens.weight": (V, D), "lm_head.weight": (V, D), "model.norm.weight": (D,)}
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
    """FOLDER/llava and FOLDER/clip as published; the full CLIP has a text part beside the vision."""
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
            pixels = images[at:at + 1] if I in row else None
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
