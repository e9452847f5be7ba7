"""Small files of every kind, ways to damage them, and what a reader may make of the damage.

`CHECKS[kind](whole, damaged, folder)` reads the damaged bytes as the pipeline would. It gives
`refused` or `accepted`; whatever else happens is a fault of the reader. `accepted` means that the
values are those of the whole file, where the kind promises to notice any change.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import struct
import warnings
from pathlib import Path

import crafted
import drawing
import numpy as np
import overlays
import safetensors.torch
import torch
import yaml
from hypothesis import HealthCheck, Phase, given, seed, settings
from PIL import Image
from running import ROOT, output, overlay, workflow
from test_config import BASE, VALUES, nested, paths
from test_quick_decode import both, same, ways

import kt
from kt import cluster, config, pseudo_labels, report
from kt.core import auto, foreign, images, model, reached, records, resume, step, table
from kt.core.class_table import ClassTable
from kt.core.layouts import SPLITS
from kt.core.step import ConfigError, DataError
from kt.pretext_train import pool_context
from kt.sources import archive

MOST_PIXELS = 10**6
NUMBERS = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 0x7FFFFFFFFFFFFFFF)
FILES = [("set", name, f"{name}-{number}.jpg") for name in ("cat", "dög") for number in range(5)]
BOMB = "a: &a [1]\n" + "".join(
    f"{after}: &{after} [{', '.join(['*' + before] * 9)}]\n"
    for before, after in zip("abcdefgh", "bcdefghi", strict=True)
)
YAML_TRICKS = (
    "!!python/object/apply:os.system ['touch harmed']", "&a [*a]", "{<<: [1]}", "? {a: 1}\n: 2",
    "1e999", ".nan", "0x_", "2024-13-01", "!!set {a}", "!!binary aGk=", "\t", "\0", "\ufeff",
    "1" * 5000, "[" * 2000, "%YAML 9.9", "---\n---", "<<: *nobody", "a: b: c", "|", "~",
    "$(touch harmed)", "!!timestamp x", "!!bool x", "!!int ''", "!!float x", "\U0001f600",
    BOMB + "evaluations: {knn: {neighbours: *i}}", BOMB + "clusters: *i", BOMB + "seeds: *i",
)  # fmt: skip


# ---------------------------------------------------------------------------- whole files


def pictures() -> list[bytes]:
    """Gives one picture of each format and of the odd modes."""
    drawn = drawing.picture(1, 2, 40)
    grey, exif = drawn[..., 0], Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a note"
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    palette = Image.fromarray(drawn).convert("P")
    return [
        drawing.encoded(image, format, **options)
        for image, format, options in (
            (drawn, "JPEG", {"exif": exif}), (drawn, "JPEG", {"progressive": True}),
            (Image.fromarray(drawn).convert("CMYK"), "JPEG", {}), (drawn, "PNG", {}),
            (deep, "PNG", {}), (palette, "PNG", {"transparency": 3}), (drawn, "WEBP", {}),
            (drawn, "WEBP", {"lossless": True}), (palette, "GIF", {}),
            (palette, "GIF", {"save_all": True, "append_images": [palette] * 2}),
            (drawn, "TIFF", {}), (drawn, "TIFF", {"compression": "tiff_lzw"}),
            (drawn, "TIFF", {"compression": "tiff_deflate"}), (deep, "TIFF", {}),
            (Image.fromarray(grey.astype(np.float32)), "TIFF", {}), (drawn, "BMP", {}),
            (palette, "BMP", {}), (drawn, "PPM", {}),
        )
    ]  # fmt: skip


def tables(folder: Path) -> dict[str, bytes]:
    """Gives one table of each format."""
    random, keys = np.random.default_rng(0), crafted.names(12)
    paths = {name: folder / f"{name}.h5" for name in TABLES}
    crafted.write_pack(paths["images"], crafted.noise(12, 6), keys)
    with table.create(paths["jpegs"], "images", {}) as file:
        jpegs = [drawing.encoded(drawing.picture(i % 3, i, 8), "JPEG") for i in range(12)]
        whole = np.frombuffer(b"".join(jpegs), np.uint8)
        table.put(file, "offsets", np.cumsum([0, *map(len, jpegs)]))
        table.add(file, "data", whole.shape, np.uint8, True)[...] = whole
        table.put_strings(file, "keys", keys)
        file.attrs["size"] = 8
    crafted.write_features(paths["features"], random.normal(size=(12, 5)), keys)
    with table.create(paths["labels"], "labels", {}) as file:
        table.put(file, "labels", np.arange(12) % 3)
        table.put_strings(file, "keys", keys)
        table.put_strings(file, "classes", ["a", "b", "c"])
    with table.create(paths["clusters"], "clusters", {}) as file:
        for name, shape in (("centroids", (3, 4)), ("mean", (5,)), ("projection", (5, 4))):
            table.put(file, name, random.normal(size=shape).astype(np.float32))
        table.put(file, "sizes", np.array([4, 5, 3]))
        table.put(file, "objective", np.array([3.0, 2.0]))
        file.attrs["l2"] = True
    with table.create(paths["pseudo_labels"], "pseudo_labels", {}) as file:
        table.put(file, "labels", np.arange(12) % 3)
        table.put(file, "clusters", np.arange(12) % 3)
        table.put(file, "distances", random.random(12).astype(np.float32))
        table.put_strings(file, "keys", keys)
        file.attrs["num_labels"] = 3
    return {name: path.read_bytes() for name, path in paths.items()}


def models(folder: Path) -> dict[str, bytes]:
    """Gives the weights and the description of a model."""
    plugin = crafted.plugin(crafted.PLAIN, widths=[2, 3])
    model.save(folder, model.fresh(plugin, 0), plugin, {"name": "m", "size": 12})
    return {name: (folder / name).read_bytes() for name in ("model.safetensors", "model.json")}


def records_of_steps(folder: Path) -> dict[str, bytes]:
    """Gives one JSON file of each kind that a step reads."""
    score = {"model": "m", "arm": "direct", "dataset": "images", "evaluation": "knn", "seed": 0}
    content = {
        "evaluation": {"records": [score | {"metric": "top1", "value": 0.5, "n": 12}]},
        "choice": {"layer": "conv2", "k": {"conv1": 25, "conv2": 50}},
        "report": {"mean": [0.1, 0.2, 0.3], "std": [0.2, 0.2, 0.4], "splits": {}},
    }
    for name in JSON:
        step.write_json(folder / name, content[name])
    return {name: (folder / name).read_bytes() for name in JSON}


def clusterings(folder: Path) -> list[bytes]:
    """Gives the state of a clustering in its second run."""
    state = reached.Reached(folder / "kmeans", "of this")
    for number in range(2):
        centroids, objective, _ = state.begin(np.full((3, 2), number, np.float32))
        state.saved = -np.inf
        state.after(centroids + 1, [*objective, 4.0], number == 0)
    return [(folder / "kmeans").read_bytes()]


def checkpoints(folder: Path) -> list[tuple[str, bytes]]:
    """Gives weights from elsewhere, as both formats have them."""
    state = {"stem.weight": torch.arange(6.0).view(2, 3), "stem.bias": torch.ones(2)}
    torch.save({"state_dict": state, "epoch": 3}, folder / "w.pth")
    safetensors.torch.save_file(state, folder / "w.safetensors")
    return [(name, (folder / name).read_bytes()) for name in ("w.pth", "w.safetensors")]


def states(folder: Path) -> list[bytes]:
    """Gives a resume state."""
    resume.save(folder, 7, {"step": 7, "network": {"weights": torch.arange(6.0)}}, {"lr": 1})
    return [path.read_bytes() for path in folder.glob("*.state")]


def archives(folder: Path) -> list[bytes]:
    """Gives zips and tars, as they are and compressed."""
    files = drawing.tree(2, 1, 1, 8)
    return [
        drawing.write_zip(files, folder / "a.zip").read_bytes(),
        drawing.write_tar(files, folder / "a.tar").read_bytes(),
        *(
            drawing.write_tar(files, folder / f"a.tar.{kind}", f"w:{kind}").read_bytes()
            for kind in ("gz", "bz2", "xz")
        ),
    ]


def classes() -> list[bytes]:
    """Gives tables of classes: bare, with splits, with quotes, in other columns and folders."""
    bare = "\n".join(["file,class", *(f"{'/'.join(file)},{file[-2]}" for file in FILES)])
    splits = [f"{'/'.join(file)};train;{file[-2]}" for file in FILES[::2]]
    splits += [f"{'/'.join(file)};test;{file[-2]}" for file in FILES[1::2]]
    quoted = [f'"{file[-1]}", "{file[-2]}, or so"' for file in FILES]
    return [
        text.encode(encoding)
        for text, encoding in (
            (bare, "utf-8"), ("\n".join(["path;split;label", *splits]), "utf-8-sig"),
            ("\r\n".join(["id,species", *quoted]), "utf-8"), (bare.replace(",", "\t"), "utf-8"),
        )
    ]  # fmt: skip


def texts() -> list[bytes]:
    """Gives overlays on the configuration as YAML."""
    files = [ROOT / "tests" / "tiny.yaml", *sorted((ROOT / "presets").glob("*.yaml"))]
    return [path.read_bytes() for path in files]


def corpus(folder: Path) -> dict[str, list]:
    """Gives the whole files of each kind; those of tables and models with their names."""
    return {
        "picture": pictures(),
        "table": list(tables(folder).items()),
        "model": [(name, models(folder)) for name in models(folder)],
        "state": states(folder),
        "archive": archives(folder),
        "yaml": texts(),
        "config": [b""],
        "plan": [b""],
        "classes": classes(),
        "json": list(records_of_steps(folder).items()),
        "clustering": clusterings(folder),
        "weights": checkpoints(folder),
    }


# ---------------------------------------------------------------------------- damage


def damage(whole: bytes, other: bytes, random: np.random.Generator) -> bytes:
    """Damages bytes in one to three ways; half of the places lie in the first 512 bytes."""
    data = bytearray(whole)
    for _ in range(random.integers(1, 4)):
        data = data or bytearray(b"\0")
        at = int(random.integers(min(len(data), 512 if random.random() < 0.5 else len(data))))
        length = int(2 ** random.uniform(0, 9))
        way = random.integers(8)
        if way == 0:
            data[at] ^= 1 << int(random.integers(8))
        elif way == 1:
            data[at : at + length] = random.bytes(len(data[at : at + length]))
        elif way == 2:
            del data[at:]
        elif way == 3:
            data[at : at + length] = bytes(len(data[at : at + length]))
        elif way == 4:
            del data[at : at + length]
        elif way == 5:
            data[at:at] = data[at : at + length]
        elif way == 6:
            start = int(random.integers(max(1, len(other))))
            data[at : at + length] = other[start : start + length]
        else:
            number, code = NUMBERS[random.integers(len(NUMBERS))], "HIQ"[random.integers(3)]
            packed = struct.pack(
                "<>"[random.integers(2)] + code, number % 2 ** (8 * struct.calcsize(code))
            )
            data[at : at + len(packed)] = packed
    return bytes(data)


# ---------------------------------------------------------------------------- readers


def check_picture(whole, damaged: bytes, folder: Path) -> str:
    """Decodes a picture on both ways: to the same pixels, or refused for the same reason."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = both(damaged, 24, ways(), MOST_PIXELS)
    assert same(found), f"quick: {found[0]}, Pillow: {found[1]}"
    if isinstance(found[0], str):
        assert found[0] and " at 0x" not in found[0]
        return "refused"
    assert found[0].pixels.shape == (3, 24, 24) and found[0].pixels.dtype == np.uint8
    return "accepted"


def check_classes(whole, damaged: bytes, folder: Path) -> str:
    """Reads a table of classes and asks it where files belong."""
    path = folder / "classes.csv"
    path.write_bytes(damaged)
    try:
        found = ClassTable(str(path))
        for file in FILES:
            found.see(file, True)
        found.settle("a folder", "")
    except (ConfigError, DataError) as error:
        assert str(error)
        return "refused"
    for file in FILES:
        split, name, fault = found.place(file)
        assert split in SPLITS and (name is None or name) and not fault
    return "accepted"


def read_features(path: Path):
    """Reads features as clustering does."""
    with table.read(path, "features", {"features": 2, "keys": 1}) as file:
        return table.strings(file, "keys"), file["features"][...]


def read_jpegs(path: Path):
    """Reads a pack of JPEGs and decodes all of them, as trainings do."""
    found = images.read_pack(path)
    return found.keys, found.images[np.arange(len(found))]


TABLES = {
    "images": images.read_pack, "jpegs": read_jpegs, "labels": images.read_labels,
    "features": read_features,
    "clusters": cluster.read_clusters, "pseudo_labels": pseudo_labels.read_pseudo_labels,
}  # fmt: skip


def values(found) -> str:
    """Gives a digest of whatever a reader gives."""
    if isinstance(found, np.ndarray):
        array = np.ascontiguousarray(found)
        return hashlib.sha256(f"{array.dtype}{array.shape}".encode() + array.tobytes()).hexdigest()
    if hasattr(found, "__dict__"):
        found = {name: inner for name, inner in vars(found).items() if name != "path"}
    if isinstance(found, dict):
        return repr({name: values(inner) for name, inner in found.items()})
    if isinstance(found, tuple | list) and not all(isinstance(inner, str) for inner in found):
        return repr([values(inner) for inner in found])
    return repr(found)


def check_table(whole, damaged: bytes, folder: Path) -> str:
    """Reads a table by the reader of its format; a change must be refused."""
    name, content = whole
    path, expected = folder / "t.h5", folder / "whole.h5"
    expected.write_bytes(content)
    path.write_bytes(damaged)
    for look in (table.digest, report.read_origin):  # what others ask of a file that stands there
        with contextlib.suppress(DataError):
            look(path)
    try:
        found = values(TABLES[name](path))
    except DataError:
        return "refused"
    assert found == values(TABLES[name](expected)), f"a changed table of {name} is accepted"
    return "accepted"


def check_model(whole, damaged: bytes, folder: Path) -> str:
    """Loads a model with one damaged file; a changed network must be refused."""
    name, files = whole
    probe = torch.linspace(0, 255, 3 * 12 * 12).view(1, 3, 12, 12).byte()
    features = []
    for changes in ({name: damaged}, {}):
        for other, content in (files | changes).items():
            (folder / other).write_bytes(content)
        try:
            features.append(kt.load_backbone(folder).features(probe, map=2))
        except (DataError, ConfigError):
            assert changes, "the whole model is refused"
            return "refused"
    assert torch.equal(*features), "a changed model is accepted"
    return "accepted"


def check_state(whole, damaged: bytes, folder: Path) -> str:
    """Looks for the newest state; one of two has a digest that fits its damaged content."""
    for payload in (damaged, hashlib.sha256(damaged[32:]).digest() + damaged[32:]):
        for old in folder.glob("*.state"):
            old.unlink()
        (folder / "step-000000007.state").write_bytes(payload)
        try:
            found = resume.newest(folder, {"lr": 1}, torch.device("cpu"))
        except ConfigError:
            found = None
        if payload is damaged and found is not None:
            assert torch.equal(found["network"]["weights"], torch.arange(6.0)), "changed state"
    return "refused" if found is None else "accepted"


def read_report(path: Path):
    """Reads the statistics of a data report as trainings do."""
    found = pool_context(crafted.pack(crafted.noise(2, 6), crafted.names(2)), path, 0)
    return found.mean.numpy(), found.std.numpy()


JSON = {
    "evaluation": records.read_evaluation, "report": read_report,
    "choice": lambda path: auto.settled(path, "auto", "auto"),
}  # fmt: skip


def check_json(whole, damaged: bytes, folder: Path) -> str:
    """Reads a step's JSON by the reader of its kind; a change must be refused."""
    name, content = whole
    path, expected = folder / "j.json", folder / "whole.json"
    expected.write_bytes(content)
    path.write_bytes(damaged)
    try:
        found = JSON[name](path)
    except DataError as error:
        assert str(path) in str(error)
        return "refused"
    wanted = repr(JSON[name](expected)).replace("whole", "j")
    assert repr(found) == wanted, f"a changed {name} is accepted"
    return "accepted"


def check_clustering(whole, damaged: bytes, folder: Path) -> str:
    """Goes on from the state of a clustering; a changed one must not be used."""
    found = []
    for content in (whole, damaged):
        (folder / "kmeans").write_bytes(content)
        found.append(reached.Reached(folder / "kmeans", "of this").runs)
    if not found[1]:
        return "refused"
    assert values(found[1]) == values(found[0]), "a changed clustering is gone on with"
    return "accepted"


def check_weights(whole, damaged: bytes, folder: Path) -> str:
    """Reads weights from elsewhere: tensors or a refusal, whatever the file says."""
    path = folder / whole[0]
    path.write_bytes(damaged)
    try:
        found = foreign.read(path)
    except DataError as error:
        assert str(path) in str(error)
        return "refused"
    assert found and all(isinstance(one, torch.Tensor) for one in found.values())
    return "accepted"


def check_archive(whole, damaged: bytes, folder: Path) -> str:
    """Lists an archive and reads its members."""
    path = folder / "archive"
    path.write_bytes(damaged)
    values = dict(BASE["datasets"]["fashion_mnist"])
    values |= {"source": "archive", "path": str(path), "max_pixels": MOST_PIXELS}
    dataset = config.Dataset(**values)
    try:
        for entry in archive.entries(dataset):
            if entry.usable:
                try:
                    entry.read()
                except OSError:
                    pass
    except DataError:
        return "refused"
    return "accepted"


def answer(overlay) -> str:
    """Resolves an overlay; what is accepted can be written as YAML and JSON and read again."""
    try:
        found = config.resolve(ROOT, overlay)
    except ConfigError as error:
        assert str(error)
        return "refused"
    text = yaml.safe_dump(found.model_dump(mode="json"))
    assert config.check(config.Config, yaml.safe_load(text)) == found
    return "accepted"


def check_yaml(whole, damaged: bytes, folder: Path) -> str:
    """Reads damaged YAML, with a trick in it now and then; also as an option of a step."""
    random = np.random.default_rng(len(damaged))
    if random.random() < 0.5:
        trick = YAML_TRICKS[random.integers(len(YAML_TRICKS))].encode("utf-8", "replace")
        at = int(random.integers(len(damaged) + 1))
        damaged = damaged[:at] + trick + damaged[at:]
    path = folder / "overlay.yaml"
    path.write_bytes(damaged)
    try:
        config.json_of(config.Training)(damaged.decode(errors="replace"))
    except argparse.ArgumentTypeError:
        pass
    try:
        overlay = config.read(path)
    except ConfigError as error:
        assert str(error)
        return "refused"
    return answer(overlay)


def check_config(whole, damaged: bytes, folder: Path) -> str:
    """Puts one value, drawn by hypothesis, at one place of the configuration."""
    said = []
    number = int.from_bytes(damaged[:8].ljust(8, b"\1"), "little")
    places = list(paths(BASE))

    @seed(number)
    @settings(max_examples=1, database=None, deadline=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(VALUES)
    def resolve(value):
        said.append(answer(nested(places[number % len(places)], value)))

    resolve()
    return said[-1]


def check_plan(whole, damaged: bytes, folder: Path) -> str:
    """Lets Snakemake plan a run whose settings say several odd things at once."""
    place = folder / "planned"
    if not place.exists():
        drawing.write_folder(drawing.tree(20, 5, 5), place)
    values = overlays.drawn(np.random.default_rng([*damaged]))
    done = workflow(folder / "run", place, "-n", files=[overlay(folder / "plan.yaml", values)])
    said = output(done)
    assert done.returncode in (0, 2, 3) and "Traceback" not in said, f"{values}\n{said}"
    assert done.returncode == 0 or "error: " in said, f"{values}\n{said}"
    return "refused" if done.returncode else "accepted"


CHECKS = {
    "picture": check_picture, "table": check_table, "model": check_model, "state": check_state,
    "archive": check_archive, "yaml": check_yaml, "config": check_config, "classes": check_classes,
    "json": check_json, "clustering": check_clustering, "weights": check_weights,
    "plan": check_plan,
}  # fmt: skip
