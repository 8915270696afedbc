from __future__ import annotations

import collections
import pickle
import struct
import zipfile

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.errors import CheckpointError
from tokenizer.checkpoint import from_pretrained
from tokenizer.reference_import import RENAMED, import_reference_checkpoint, read_reference_config
from tokenizer.reference_pickle import Inert, StoredTensor, TorchFile

VIDEO = "video_l18_blockcausal"


@pytest.fixture
def refused(tmp_path, monkeypatch, official):
    """Imports a file in an empty folder, expects it to be refused, and that nothing was written or executed."""
    folder = tmp_path / "watched"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def import_it(reference_pt, words, config_yaml=None):
        config_yaml = config_yaml or official(f"{VIDEO}/config.yaml")
        with pytest.raises(CheckpointError, match=words) as caught:
            import_reference_checkpoint(reference_pt, config_yaml, folder / "out")
        assert "\n" not in str(caught.value)
        assert list(folder.iterdir()) == []

    return import_it


def torch_zip(path, pickled, storages=(), *, byteorder=b"little", compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("x/data.pkl", pickled)
        archive.writestr("x/byteorder", byteorder)
        for key, content in storages:
            archive.writestr(f"x/data/{key}", content)
    return path


def pickled_tensor(storage_values=4, offset=0, shape=(2, 2), stride=(2, 1), key="0", dtype=b"FloatStorage"):
    """A pickle of one tensor, written opcode by opcode."""

    def number(value):
        return pickle.BININT + struct.pack("<i", value)

    def text(value):
        return pickle.BINUNICODE + struct.pack("<I", len(value)) + value.encode()

    def numbers(values):
        return pickle.MARK + b"".join(map(number, values)) + pickle.TUPLE

    return (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n" + pickle.MARK + pickle.MARK
        + text("storage") + b"ctorch\n" + dtype + b"\n" + text(key) + text("cpu") + number(storage_values)
        + pickle.TUPLE + pickle.BINPERSID + number(offset) + numbers(shape) + numbers(stride)
        + pickle.NEWFALSE + pickle.EMPTY_DICT + pickle.TUPLE + pickle.REDUCE + pickle.STOP
    )  # fmt: skip


class TestHostile:
    @pytest.mark.parametrize(
        ("name", "words"),
        [
            ("hostile.pt", r"refused: it asks for __builtin__\.exec, .* Nothing was executed"),
            ("hostile_legacy.pt", "no zip archive.*before torch 1.6"),
        ],
    )
    def test_files_that_execute_code_are_refused(self, official, refused, name, words):
        refused(official(name), words)

    @pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
    def test_a_call_of_any_protocol_is_refused(self, tmp_path, refused, protocol):
        class Attack:
            def __reduce__(self):
                return (eval, ("open('PWNED', 'w')",))

        pickled = pickle.dumps({"state_dict": Attack()}, protocol)
        refused(torch_zip(tmp_path / "a.pt", pickled), "refused|damaged")

    @pytest.mark.parametrize(
        "pickled",
        [
            b'\x80\x02(S\'open("PWNED","w")\'\ni__builtin__\neval\n.',
            b"\x80\x02(c__builtin__\neval\nX\x11\x00\x00\x00open('PWNED','w')o.",
            b"\x80\x02\x82\x01.",
            b"\x80\x04X\x02\x00\x00\x00osX\x06\x00\x00\x00system\x93.",
            b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nNN\x86R.",
            b"\x80\x02N2.",
        ],
        ids=["INST", "OBJ", "EXT1", "STACK_GLOBAL", "bad tensor", "DUP"],
    )
    def test_no_opcode_gets_through(self, tmp_path, refused, pickled):
        refused(torch_zip(tmp_path / "a.pt", pickled), "refused|damaged")

    def test_allowed_names_are_never_called(self, tmp_path):
        """dict, getitem and encode of real checkpoints stand for nothing here, whatever they are called with."""
        pickled = b"\x80\x02c_operator\ngetitem\n}X\x01\x00\x00\x00a\x86R."
        with TorchFile(torch_zip(tmp_path / "a.pt", pickled)) as file:
            assert isinstance(file.root, Inert)

    def test_tuples_of_tuples_are_not_unfolded(self, tmp_path, refused):
        pickled = b"\x80\x02)" + b"q\x00h\x00\x86" * 200 + b"h\x00\x93."
        refused(torch_zip(tmp_path / "a.pt", pickled), "damaged")

    def test_a_large_memo_index_takes_no_memory(self, tmp_path, refused):
        refused(torch_zip(tmp_path / "a.pt", b"\x80\x02}r\xff\xff\xff\xff."), "holds no state_dict")

    @pytest.mark.parametrize(
        ("pickled", "words"),
        [(b"", "damaged|cut off"), (b"\x80\x02}", "damaged"), (b"\x80\x02X\xff\xff\xff\x7fa", "damaged")],
    )
    def test_a_pickle_cut_off_is_refused(self, tmp_path, refused, pickled, words):
        refused(torch_zip(tmp_path / "a.pt", pickled), words)

    def test_archives_torch_would_not_write(self, tmp_path, refused):
        compressed = torch_zip(tmp_path / "a.pt", bytes(1 << 20), compression=zipfile.ZIP_DEFLATED)
        refused(compressed, "entries of the archive are compressed")
        refused(torch_zip(tmp_path / "b.pt", bytes(5 << 20)), "data.pkl has 5,242,880 bytes; at most 4,194,304")
        refused(torch_zip(tmp_path / "c.pt", pickled_tensor(), byteorder=b"big"), "not little-endian")
        with zipfile.ZipFile(tmp_path / "d.pt", "w") as archive:
            archive.writestr("readme.txt", "hello")
        refused(tmp_path / "d.pt", "no data.pkl")
        refused(tmp_path / "none.pt", "cannot be read: No such file")

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"shape": (3, 2)}, "outside its storage"),
            ({"offset": 1}, "outside its storage"),
            ({"stride": (3, 1)}, "outside its storage"),
            ({"shape": (1 << 20, 1 << 20), "stride": (0, 0)}, "outside its storage"),
            ({"storage_values": 5}, "missing or cut off"),
            ({"key": "1"}, "missing or cut off"),
            ({"key": "../data.pkl"}, "missing or cut off"),
            ({"storage_values": 1 << 30, "shape": (1 << 15, 1 << 15), "stride": (1 << 15, 1)}, "missing or cut off"),
        ],
    )
    def test_a_tensor_stays_inside_its_storage(self, tmp_path, change, words):
        path = torch_zip(tmp_path / "a.pt", pickled_tensor(**change), [("0", bytes(16))])
        with TorchFile(path) as file, pytest.raises(CheckpointError, match=words):
            file.tensor(file.root, "w")

    @pytest.mark.parametrize(
        "change", [{"shape": (-2, 2)}, {"offset": -1}, {"shape": (2,)}, {"dtype": b"Size"}, {"storage_values": -4}]
    )
    def test_a_tensor_of_impossible_form_is_refused(self, tmp_path, change):
        path = torch_zip(tmp_path / "a.pt", pickled_tensor(**change), [("0", bytes(16))])
        with pytest.raises(CheckpointError, match="damaged"):
            TorchFile(path)

    @settings(max_examples=300, deadline=None)
    @given(st.data())
    def test_no_damage_does_more_than_be_refused(self, tmp_path_factory, official, data):
        with zipfile.ZipFile(official(f"{VIDEO}/reference.pt")) as archive:
            pickled = bytearray(archive.read("reference/data.pkl"))
        for _ in range(data.draw(st.integers(1, 5))):
            pickled[data.draw(st.integers(0, len(pickled) - 1))] = data.draw(st.integers(0, 255))
        path = torch_zip(tmp_path_factory.mktemp("fuzz") / "a.pt", bytes(pickled))
        try:
            TorchFile(path).__exit__(None, None, None)
        except CheckpointError as error:
            assert "\n" not in str(error)


class TestReading:
    def test_what_torch_saves_is_read_back(self, tmp_path):
        """Every dtype, views, transposes, empty and scalar tensors, parameters."""
        base = torch.randn(4, 6)
        saved = {
            "view": base[1:3, ::2],
            "transposed": base.T,
            "scalar": torch.tensor(3.5),
            "empty": torch.empty(0, 3),
            "parameter": torch.nn.Parameter(torch.randn(3)),
            **{
                str(dtype): torch.randint(0, 2, (3, 2)).to(dtype)
                for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16)
            },
            **{str(dtype): torch.tensor([0, 1, 1]).to(dtype) for dtype in (torch.int8, torch.uint8, torch.bool)},
        }
        torch.save({"state_dict": collections.OrderedDict(saved), "n": [1, (2.5, None, True)]}, tmp_path / "a.pt")
        with TorchFile(tmp_path / "a.pt") as file:
            assert file.root["n"] == [1, (2.5, None, True)]
            for name, tensor in saved.items():
                stored = file.root["state_dict"][name]
                assert isinstance(stored, StoredTensor)
                read = file.tensor(stored, name)
                assert read.dtype == tensor.dtype
                assert torch.equal(read, tensor.detach())
                assert read.is_contiguous()


class TestImport:
    def test_the_card_says_which_weights_were_taken(self, official, tmp_path):
        for use_ema, kind in ((True, "ema_state_dict"), (False, "`state_dict`")):
            out = tmp_path / str(use_ema)
            config = import_reference_checkpoint(
                official(f"{VIDEO}/reference.pt"), official(f"{VIDEO}/config.yaml"), out, use_ema=use_ema
            )
            assert kind in (out / "card.md").read_text()
            assert from_pretrained(out).config == config
            assert config.trained

    @pytest.mark.parametrize("prefix", ["", "module.", "module.module.", "_orig_mod.module.", "_orig_mod."])
    def test_names_are_freed_from_any_wrapper(self, tmp_path, prefix, tiny):
        path, config = written_like_the_reference(tmp_path, tiny, prefix)
        import_reference_checkpoint(path, config, tmp_path / "out")
        loaded = from_pretrained(tmp_path / "out")
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), tiny.parameters(), strict=True))

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda w: w.pop("module.quant_embed.bias"), "missing to_latents.bias"),
            (lambda w: w.update({"module.extra": torch.zeros(1)}), "unexpected extra"),
            (lambda w: w.update({"quant_embed.bias": torch.zeros(18)}), "holds 'quant_embed.bias' twice"),
            (lambda w: w.update({"module.quant_embed.bias": torch.zeros(1)}), r"shape \[1\] instead of \[18\]"),
            (lambda w: w.update({"module.quantize.embedding.weight": torch.zeros(64, 8)}), "a VQ model"),
            (lambda w: w.update({"module.n": 3}), "no named tensor"),
            (lambda w: w.clear(), "holds no state_dict"),
        ],
    )
    def test_every_weight_must_fit(self, tmp_path, refused, tiny, change, words):
        refused(*_swap(written_like_the_reference(tmp_path, tiny, "module.", change), words))

    @pytest.mark.parametrize(
        ("case", "words"),
        [("not_bsq_vq", "'VITVQModel'; only VITBSQModel"), ("not_bsq_logit_laplace", "logit_laplace models are not")],
    )
    def test_other_models_are_refused(self, official, refused, tmp_path, case, words):
        refused(tmp_path / "any.pt", words, official(f"{case}/config.yaml"))

    @pytest.mark.shared
    def test_a_vq_model_with_the_config_of_another_is_refused(self, official, refused):
        refused(official("not_bsq_vq/reference.pt"), "a VQ model with a learned codebook")


def _set(params, value, *keys):
    for key in keys[:-1]:
        params = params[key]
    params[keys[-1]] = value


class TestConfig:
    def test_the_range_of_pixels_follows_from_the_data(self, official, tmp_path):
        document = yaml.safe_load(official(f"{VIDEO}/config.yaml").read_text())
        for zero_mean, expected in ((True, (-1, 1)), (False, (0, 1))):
            document["data"]["zero_mean"] = zero_mean
            (tmp_path / "c.yaml").write_text(yaml.safe_dump(document))
            assert read_reference_config(tmp_path / "c.yaml").clamp_range == expected

    @pytest.mark.parametrize(
        ("keys", "value", "words"),
        [
            (("model", "params", "embed_dims"), 18, r"unknown key 'embed_dims'.*Did you mean 'embed_dim'\?"),
            (("model", "params", "vitconfig", "depth"), 2, "unknown key 'depth' in model.params.vitconfig"),
            (("model", "params", "vitconfig", "width"), "wide", "width is 'wide'"),
            (("model", "params", "vitconfig", "mlp_ratio"), [1], "wrong type"),
            (("model", "params", "vitconfig", "act_layer"), "relu", "act_layer is 'relu'; only 'gelu'"),
            (("model", "params", "vitconfig", "mask_type"), "causal", "mask_type is 'causal'; clips need"),
            (("model", "params", "vitconfig", "mask_type"), None, "mask_type is 'none'; clips need"),
            (("model", "params", "vitconfig", "mask_block_size"), 8, "mask_block_size is 8"),
            (("model", "params", "vitconfig", "mask_block_size"), None, "mask_block_size is None"),
            (("model", "params", "vitconfig", "cross_frames"), False, "frames that do not see each other"),
            (("model", "params", "vitconfig", "image_size"), 64, "image_size differs between encoder and decoder"),
            (("model", "params", "embed_dim"), None, "bits_per_token is None"),
            (("model", "params", "embed_group_size"), 7, "not a multiple of group_size, 7"),
            (("model", "params", "cb_entropy_compute"), "nce", "'nce' is not supported"),
            (("model", "params", "persample_entropy_compute"), ["group"], "known: analytical, group"),
            (("model", "params", "clamp_range"), [0, 2], "clamp_range is"),
            (("model", "params", "vitconfig"), None, "the section 'vitconfig' is missing"),
            (("model", "target"), "a.b.Other", "model.target is 'Other'"),
            (("model",), None, "the section 'model' is missing"),
            (("data",), None, "the section 'data' is missing"),
            (("data", "zero_mean"), None, "data.zero_mean is missing"),
        ],
    )
    def test_what_is_not_done_here_is_refused_by_name(self, official, tmp_path, keys, value, words):
        document = yaml.safe_load(official(f"{VIDEO}/config.yaml").read_text())
        _set(document, value, *keys)
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(document))
        with pytest.raises(CheckpointError, match=words) as caught:
            read_reference_config(tmp_path / "c.yaml")
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("model: !!python/object/apply:os.system ['touch PWNED']", "cannot be read: ConstructorError"),
            ("a: &a [1]\nb: *a\n", "aliases"),
            ("model: 2001-99-99", "cannot be read: ValueError"),
            ("[" * 60_000, "over 200 brackets"),
            ("- " * 30_000, "cannot be read: RecursionError"),
            ("x" * (1 << 19), "over 65,536 bytes"),
            ("", "the section 'model' is missing"),
        ],
    )
    def test_hostile_yaml_is_refused(self, tmp_path, monkeypatch, text, words):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "c.yaml").write_text(text)
        with pytest.raises(CheckpointError, match=words):
            read_reference_config("c.yaml")
        assert not (tmp_path / "PWNED").exists()


def written_like_the_reference(folder, model, prefix, change=lambda weights: None):
    """Our weights under the reference's names: a checkpoint and its config."""
    weights = {}
    for name, tensor in model.state_dict().items():
        for theirs, ours in reversed(RENAMED):
            if ours in name:
                name = name.replace(ours, theirs, 1)
        weights[prefix + name] = tensor
    weights[f"{prefix}quantize.basis"] = 2 ** torch.arange(17, -1, -1)
    change(weights)
    torch.save({"state_dict": weights, "ema_state_dict": None}, folder / "reference.pt")
    half = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "heads": 2, "num_frames": 8}
    half["mask_type"] = "block-causal"
    params = {"embed_dim": 18, "vitconfig": half, "dvitconfig": {**half, "dim_ffn_output": 128}}
    document = {"model": {"target": "m.VITBSQModel", "params": params}, "data": {"zero_mean": True}}
    (folder / "config.yaml").write_text(yaml.safe_dump(document))
    return folder / "reference.pt", folder / "config.yaml"


def _swap(written, words):
    return written[0], words, written[1]
