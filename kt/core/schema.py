"""The settings and their types: what stands where in `config.yaml`, and what each value means."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    FiniteFloat,
    Tag,
    model_serializer,
    model_validator,
)

from kt.core.auto import AUTO

ARMS = ("random", "direct", "transfer", "untrained", "hog", "supervised", "longer")
# What PyYAML raises on numbers, dates and nesting that are none, beside its own errors.
CRASHES = (ValueError, TypeError, AttributeError, LookupError, RecursionError)
NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"
OF = NAME[:-1] + r"(/[A-Za-z0-9][A-Za-z0-9_.-]*)?$"
Name = Annotated[str, Field(pattern=NAME, max_length=100)]  # part of file names
Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
PRETRAINED = "pretrained"  # as a path of weights: published ones
Three = {"min_length": 3, "max_length": 3}  # red, green, blue


class Settings(BaseModel):
    """Base of all settings: unknown keys are errors, strings are coerced by declared type."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Plugin(Settings):
    """Names one file of `kt/tasks` or `kt/backbones`; its options stand beside the name."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: Annotated[str, Field(description="file name of the plug-in")]

    def options(self) -> dict[str, Any]:
        """Gives all values but the name."""
        return dict(self.model_extra or {})


class Dataset(Settings):
    """One set of images and where it comes from."""

    source: Annotated[str, Field(description="file of kt/sources that reads it")]
    path: Annotated[str | None, Field(description="folder or archive, where the source needs one")]
    size: Annotated[int, Field(ge=12, le=1024, description="edge of the packed images, pixels")]
    unlabelled: Annotated[Count | None, Field(description="most images without labels; null: all")]
    labelled: Annotated[Count | None, Field(description="most labelled training images; null: all")]
    test: Annotated[Count | None, Field(description="most test images; null: all")]
    max_bad_fraction: Annotated[
        Fraction, Field(description="share of unreadable files to tolerate")
    ]
    max_pixels: Annotated[int, Field(ge=1024, description="larger images are refused unopened")]
    near_copies: Annotated[
        Fraction | None,
        Field(description="copies of test images differ by less of the contrast; null: exact only"),
    ]
    storage: Annotated[
        Literal["pixels", "jpeg"], Field(description="of the packs; jpeg for more than the memory")
    ]
    labels: Annotated[
        str | None,
        Field(description="null: by train/CLASS, test/CLASS; `folders`: by CLASS; or a CSV"),
    ] = None
    levels: Annotated[
        tuple[FiniteFloat, FiniteFloat] | None,
        Field(description="black and white of grey images of 16 bits or floats; null: by rule"),
    ] = None

    @model_validator(mode="after")
    def _levels_differ(self):
        if self.levels and self.levels[0] >= self.levels[1]:
            raise ValueError(f"levels: expected the darker one first, found {[*self.levels]}")
        return self

    @model_serializer(mode="wrap")
    def _as_before(self, handler) -> dict[str, Any]:
        """Leaves out what is not given of the later keys: what stands was made without them."""
        found = handler(self).items()
        return {key: value for key, value in found if key not in ("labels", "levels") or value}


class Use(Settings):
    """Which data set serves which step; the four may differ (paper, section 3)."""

    pretext: Annotated[Name, Field(description="teachers are trained on it")]
    cluster: Annotated[Name, Field(description="k-means is fitted on it")]
    target: Annotated[Name, Field(description="it gets pseudo-labels and trains the target")]
    evaluate: Annotated[Name, Field(description="models are judged on its train and test splits")]


class Schedule(Settings):
    """How weights are learned, whatever the loss."""

    epochs: Annotated[Count, Field(description="passes over the images, times `effort`")]
    batch: Annotated[Count, Field(description="images a step")]
    optimiser: Annotated[Literal["sgd", "adamw"], Field(description="sgd (Nesterov off) or adamw")]
    lr: Annotated[float, Field(gt=0, description="highest learning rate")]
    momentum: Annotated[float, Field(ge=0, lt=1, description="of sgd; first beta of adamw")]
    weight_decay: Annotated[float, Field(ge=0, description="on weights, not on biases and norms")]
    schedule: Annotated[
        Literal["cosine", "step"], Field(description="cosine to 0, or lr / 10 steps")
    ]
    milestones: Annotated[list[Fraction], Field(description="of `step`: shares of the training")]
    warmup: Annotated[Fraction, Field(description="share of the steps with linearly rising lr")]
    precision: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        Field(
            description="auto: bfloat16 where the hardware computes it, else float16 on a GPU, "
            "float32 on a CPU"
        ),
    ]
    deterministic: Annotated[
        bool, Field(description="on CUDA the same bits each time, slower; on a CPU always")
    ]


class Training(Schedule):
    """How a network is trained on packed images; one loop serves every such network."""

    label_smoothing: Annotated[Fraction, Field(description="of the cross-entropy")]
    compile: Annotated[bool, Field(description="torch.compile, on CUDA only")]


class Weights(Settings):
    """Weights that were trained elsewhere."""

    path: Annotated[
        str,
        Field(
            min_length=1,
            description=f"`.safetensors`, or what torch.save wrote of weights; `{PRETRAINED}`: "
            "those that torchvision or timm publish",
        ),
    ]
    mean: Annotated[
        Annotated[list[Fraction], Field(**Three)] | None,
        Field(description="of their images by channel; null: theirs if known, or ours"),
    ]
    std: Annotated[
        Annotated[list[Annotated[float, Field(gt=0, le=1)]], Field(**Three)] | None,
        Field(description="the same for the standard deviation"),
    ]


class Teacher(Settings):
    """A network or descriptor that describes images; its features are clustered."""

    backbone: Annotated[Plugin | Name, Field(description="plug-in and options, or a target's name")]
    task: Annotated[Plugin | None, Field(description="pretext task; null: is not trained")]
    training: Annotated[Training, Field(description="of the pretext training")]
    seeds: Annotated[Count | None, Field(description="how many are trained; null: `seeds`")]
    budget: Annotated[
        list[Name],
        Field(description="teachers and targets whose summed multiply-adds set the epochs; [] off"),
    ]
    weights: Annotated[
        Weights | None, Field(description="to start from, or with task null to use; null: random")
    ]
    features: Annotated[
        str | None,
        Field(
            description="`.npy` or HDF5 of features made elsewhere, for every layer; null: computed"
        ),
    ]
    layers: Annotated[
        list[Name], Field(description=f"layers to transfer from; [] none; {AUTO}: one is chosen")
    ]
    map: Annotated[Count, Field(description="the layer's map is pooled to map x map")]
    pool: Annotated[Literal["mean", "max"], Field(description="how it is pooled")]
    mirror: Annotated[
        bool,
        Field(description="features are averaged over the image and its mirror image"),
    ]
    transfer_as: Annotated[Literal[ARMS], Field(description="arm of the targets it teaches")]
    evaluate_as: Annotated[
        Literal["random", "direct", "longer"] | None,
        Field(description="arm under which it is judged itself; null: is not"),
    ]


class Transfer(Settings):
    """A kind of transfer, and from which teachers."""

    kind: Annotated[Plugin, Field(description="file of kt/transfers and its options")]
    of: Annotated[
        list[Annotated[str, Field(pattern=OF)]],
        Field(description="`teacher` (all its layers) or `teacher/layer`; []: every teacher"),
    ]


class Clustering(Settings):
    """k-means and the transform before it."""

    centre: Annotated[bool, Field(description="subtract the mean")]
    pca: Annotated[Count | None, Field(description="keep so many principal components; null: off")]
    whiten: Annotated[bool, Field(description="unit variance of the components (needs pca)")]
    l2: Annotated[bool, Field(description="unit length of each row")]
    spherical: Annotated[bool, Field(description="centroids of unit length, cosine assignment")]
    iterations: Annotated[Count, Field(description="of Lloyd's algorithm")]
    redo: Annotated[Count, Field(description="restarts; the best objective wins")]
    memory_mb: Annotated[
        Count, Field(description="MiB of rows kept in memory; more go to a scratch file")
    ]
    sample: Annotated[
        Count | None, Field(description="learn from so many rows per centroid; null: all")
    ]
    warm_start: Annotated[
        Count | None,
        Field(description="rows per centroid for the first 3/4 of the iterations; null: off"),
    ]


class FewImages(Settings):
    """More passes over small sets, which else would be learned in too few steps."""

    as_if: Annotated[int, Field(ge=0, description="epochs are those of so many images at least")]
    most: Annotated[float, Field(ge=1, description="but at most so many times what is given")]

    def epochs(self, epochs: int, images: int) -> int:
        """Gives the passes over a pack of so many images."""
        return round(epochs * min(self.most, max(1.0, self.as_if / max(images, 1))))


class Choice(Settings):
    """How `auto` chooses a layer and k without labels (`kt/choose.py`)."""

    images: Annotated[int, Field(ge=10, description="of the pool, at most")]
    clusters: Annotated[
        list[Annotated[int, Field(ge=2)]], Field(min_length=1, description="values of k to try")
    ]
    task: Annotated[Plugin, Field(description="label task whose augmentation makes the views")]


class Target(Settings):
    """A network that learns the pseudo-labels from scratch."""

    backbone: Annotated[Plugin, Field(description="plug-in and options")]
    task: Annotated[Plugin, Field(description="a label task, with its augmentation")]
    training: Annotated[Training, Field(description="on pseudo-labels, and for `supervised`")]
    supervised: Annotated[bool, Field(description="also train it on the true labels")]


def _as_list(value):
    if isinstance(value, str) and value.strip().startswith("["):
        try:
            value = yaml.safe_load(value)
        except (yaml.YAMLError, *CRASHES) as error:
            raise ValueError(f"expected a list such as [50, 100], found {value!r}") from error
    return value if isinstance(value, list) else [value]


# One k, with one complaint where it is neither; tags that begin so are kept out of messages.
K = Annotated[
    Annotated[int, Field(ge=2), Tag("function-number")]
    | Annotated[Literal[AUTO], Tag("function-auto")],
    Discriminator(lambda value: f"function-{AUTO if value == AUTO else 'number'}"),
]


class Config(Settings):
    """Everything a run depends on."""

    seed: Annotated[int, Field(ge=0, description="first of the seeds")]
    seeds: Annotated[Count, Field(description="repetitions of target training and label draws")]
    effort: Annotated[float, Field(gt=0, description="multiplies every epoch count (at least 1)")]
    shards: Annotated[
        Count, Field(description="jobs for each ingest, extraction and pseudo-labelling")
    ]
    few_images: Annotated[FewImages, Field(description="more epochs for small sets")]
    images: Annotated[str | None, Field(description="folder, zip or tar with your own pictures")]
    labels: Annotated[
        str | None, Field(description="of `images`, see `datasets.NAME.labels`; null: as there")
    ]
    clusters: Annotated[
        list[K],
        Field(min_length=1, description=f"values of k; {AUTO}: chosen for each teacher's layer"),
        BeforeValidator(_as_list),
    ]
    datasets: Annotated[dict[Name, Dataset], Field(min_length=1, description="by name")]
    use: Annotated[Use, Field(description="which data set serves which step")]
    teachers: Annotated[dict[Name, Teacher], Field(min_length=1, description="by name")]
    clustering: Annotated[Clustering, Field(description="k-means")]
    choice: Annotated[Choice, Field(description=f"what `{AUTO}` chooses by")]
    transfers: Annotated[
        dict[Name, Transfer], Field(min_length=1, description="kinds of transfer, by name")
    ]
    targets: Annotated[dict[Name, Target], Field(min_length=1, description="by name")]
    evaluations: Annotated[
        dict[Name, dict[str, Any]], Field(description="by name of the file in kt/evaluations")
    ]
    verdict: Annotated[
        list[Name],
        Field(description="evaluations whose validation score picks teacher, layer, k"),
    ]

    @property
    def numbers(self) -> list[int]:
        """The values of k that are given as numbers."""
        return [k for k in self.clusters if k != AUTO]
