"""The rows of the benchmark: what is compared, and the goal of each."""

from __future__ import annotations

import dataclasses

AT_LEAST, AT_MOST = "at least", "at most"


@dataclasses.dataclass(frozen=True)
class Row:
    """One figure.

    Attributes:
        name: In results.json, and of the function that measures it.
        group: The file of that function.
        goal: What the value is held against.
        direction: `at least` or `at most`.
        unit: `x` (times as fast, or as long), `share`, `s`, `exponent`.
        text: What is compared, for the page.
        rounds: How often, by default.
        cores: Cores it may use; None: all that the run has.
        cuda: Needs an accelerator; without one the row is left out.
        limit: Seconds after which it is given up.
    """

    name: str
    group: str
    goal: float
    direction: str
    unit: str
    text: str
    rounds: int = 5
    cores: int | None = None
    cuda: bool = False
    limit: int = 300


ROWS = [
    Row("puzzles_vs_lightly", "puzzles", 8, AT_LEAST, "x",
        "puzzles of 255 px images that are decoded already, one core: lightly's `Jigsaw` image by "
        "image against whole batches", cores=1),
    Row("puzzles_of_floor", "puzzles", 0.15, AT_LEAST, "share",
        "puzzles of 255 px images, one core: seconds of the bare conversion of as many tiles from "
        "uint8 to float32, as a share of the puzzles' (stretch 0.30); worst of fresh and ready "
        "memory", cores=1),
    Row("delivery_vs_dataloader", "delivery", 3, AT_LEAST, "x",
        "puzzles ready for the step, from a pack: torch's DataLoader with 2 workers, puzzles made "
        "image by image, against the training's own delivery; worst of 28, 64 and 255 px"),
    Row("ingest_vs_pillow", "ingest", 2, AT_LEAST, "x",
        "400x533 JPEG to a packed 255 px image, one core: Pillow against ingest's decoder",
        cores=1),
    Row("train_of_bare", "training", 0.95, AT_LEAST, "share",
        "training, one core: seconds of the same network, optimiser and steps on batches ready in "
        "memory, as a share of the product's; worst of pretext and target, 28 and 64 px", cores=1,
        rounds=9),
    Row("train_of_bare_cuda", "training", 0.95, AT_LEAST, "share",
        "the same on a GPU, batches ready on the device, AMP and channels_last; pretext and "
        "target, 64 px", cuda=True),
    Row("extract_of_bare", "training", 0.95, AT_LEAST, "share",
        "feature extraction into a table: the bare channels_last loop that throws its results "
        "away, as a share of the step's seconds without start-up; worst of 28 and 64 px", rounds=3),
    Row("kmeans_vs_faiss", "clustering", 1.1, AT_MOST, "x",
        "the whole `kt.cluster` step, start-up included, in times of bare `faiss.Kmeans` on an "
        "array in memory: 100,000 x 512, k = 2,000, 20 iterations, all rows", rounds=3, limit=600),
    Row("assign_of_gemm", "clustering", 0.70, AT_LEAST, "share",
        "assignment streamed from a table, the whole step without start-up: the plain matrix "
        "product of the same rows and centroids as a share of its seconds (100,000 x 512, "
        "k = 2,000)", rounds=3),
    Row("memory_growth", "memory", 1.05, AT_MOST, "x",
        "peak anonymous memory of a step at 200,000 images in times of that at 50,000; worst of "
        "ingest, features, cluster (with `memory_mb: 1`, from a file), pseudo_labels", rounds=1,
        limit=600),
    Row("hdf5_write_of_raw", "tables", 0.25, AT_LEAST, "share",
        "writing a features table (50,000 x 512): write and fsync of the same bytes as a share of "
        "its seconds"),
    Row("hdf5_sample_vs_fancy", "tables", 6, AT_LEAST, "x",
        "reading a random half of a features table's rows (100,000 x 512): h5py's fancy indexing "
        "against the product's way", rounds=7),
    Row("new_k_of_full", "workflow", 0.25, AT_MOST, "share",
        "seconds of one more k against those of the whole default run; reduced (effort 0.2, one "
        "seed, a quarter of the images) unless `--full` is given", rounds=1, limit=600),
    Row("workflow_overhead", "workflow", 1.2, AT_MOST, "x",
        "12 light jobs of the finished run (pseudo_labels) through the project's own workflow and "
        "profile, in times of a bare Snakefile's chain of 12 `touch`", rounds=3),
    Row("noop_seconds", "workflow", 1.5, AT_MOST, "s",
        "`snakemake --cores 2` once more on a finished run"),
    Row("heavy_start_seconds", "workflow", 2.3, AT_MOST, "s",
        "from the start of `python -m kt.pretext_train` to the line that begins its work"),
    Row("growth_clustering_n", "growth", 1.05, AT_MOST, "exponent",
        "seconds of clustering, by images: 12,500 to 100,000", rounds=3),
    Row("growth_clustering_d", "growth", 1.05, AT_MOST, "exponent",
        "seconds of clustering, by dimensions: 64 to 512", rounds=3),
    Row("growth_clustering_k", "growth", 1.05, AT_MOST, "exponent",
        "seconds of clustering, by clusters: 128 to 1,024", rounds=3),
    Row("growth_puzzles_n", "growth", 1.05, AT_MOST, "exponent",
        "seconds of an epoch's puzzles, by images: 4,096 to 32,768", rounds=15),
    Row("growth_extraction_n", "growth", 1.05, AT_MOST, "exponent",
        "seconds of feature extraction, by images: 4,096 to 32,768", rounds=3),
]  # fmt: skip
BY_NAME = {row.name: row for row in ROWS}


def meets(row: Row, value: float) -> bool:
    """Says whether a value reaches the goal of its row."""
    return value >= row.goal if row.direction == AT_LEAST else value <= row.goal
