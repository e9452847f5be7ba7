"""What targets are trained on: kinds of transfer, their teachers' layers, k; and the files of each.

Pure functions of the checked configuration, for `kt/workflow.py` and the rules.
"""

from __future__ import annotations

import dataclasses

from kt import config
from kt.config import AUTO, Config
from kt.core.ending import ConfigError

ONE = 1  # k of kinds that learn from features: only the transform is taken; no `clusters` may be 1
WHOLE = 10**6  # a k whose parts show the factors that a kind multiplies it by


@dataclasses.dataclass(frozen=True)
class Lesson:
    """What targets are trained on: a kind of transfer, its teachers' layers, and k.

    Attributes:
        transfer: Name of the kind's settings in the config.
        sources: Teacher and layer, more than one where a kind takes several together.
        k: Number of clusters, or `auto`; `ONE` for a kind whose lessons do not differ by k.
        round: Which one of a kind with rounds; 0 is the last, the one that is judged.
    """

    transfer: str
    sources: tuple[tuple[str, str], ...]
    k: int | str
    round: int = 0

    @property
    def origin(self) -> str:
        """Its place in paths; `hard`, the paper's kind, needs no name."""
        name = f"{self.transfer}~{self.round}" if self.round else self.transfer
        kind = "" if name == "hard" else f"{name}/"
        return f"{kind}{self.teacher}/{self.layer}/k{self.k}"

    @property
    def teacher(self) -> str:
        """Names the teachers."""
        return "+".join(name for name, _ in self.sources)

    @property
    def layer(self) -> str:
        """Names their layers."""
        return "+".join(layer for _, layer in self.sources)


def lessons(settings: Config) -> dict[str, Lesson]:
    """Lists what each target is trained on, by origin: kind of transfer x teacher x layer x k."""
    found = []
    for name, transfer in settings.transfers.items():
        wanted = transfer.of or list(settings.teachers)
        sources = []
        for teacher, _, layer in (part.partition("/") for part in wanted):
            layers = [layer] if layer else settings.teachers[teacher].layers
            sources += [(teacher, one) for one in layers]
        module = config.plugin("transfers", transfer.kind.name)
        sources = list(dict.fromkeys(sources))  # `of` may name a layer twice
        groups = [tuple(sources)] if module.TOGETHER else [(source,) for source in sources]
        numbers = settings.clusters if module.BY_K else [ONE]
        found += [Lesson(name, group, k) for group in groups if group for k in numbers]
    return {lesson.origin: lesson for lesson in found}


@dataclasses.dataclass(frozen=True)
class Describer:
    """A network whose features are clustered: a teacher, or a target that teaches in turn.

    Attributes:
        folder: Of the model.
        map: Its layer's map is pooled to map x map.
        pool: How.
        mirror: Whether features are averaged over the image and its mirror image.
    """

    folder: str
    map: int
    pool: str = "mean"
    mirror: bool = False


def describers(settings: Config) -> dict[str, Describer]:
    """Gives all of them by name; a target that teaches has its path as name, joined by `~`.

    Raises:
        ConfigError: Two transfers would have one network teach by features of two sizes.
    """
    found = {
        name: Describer(f"results/teachers/{name}/s0", teacher.map, teacher.pool, teacher.mirror)
        for name, teacher in settings.teachers.items()
    }
    for lesson in lessons(settings).values():
        options = _options(settings, lesson)
        for before in rounds(settings, lesson):
            folder = f"results/targets/{options.target}/{before.origin}/s0"
            name, describer = _graduate(options, before), Describer(folder, options.map)
            if found.get(name, describer) != describer:  # its features have one place
                raise ConfigError(
                    f"transfers.{lesson.transfer}.kind.map: expected {found[name].map}, by which "
                    f"another transfer has {folder} teach, found {options.map}"
                )
            found[name] = describer
    return found


def rounds(settings: Config, lesson: Lesson) -> list[Lesson]:
    """Lists the rounds before the one that is judged; none of most kinds.

    A first round that is the very training of another lesson is that lesson: it is done once.
    """
    number = getattr(_options(settings, lesson), "rounds", 1)
    found = [dataclasses.replace(lesson, round=one) for one in range(1, number)]
    return [_same(settings, found[0]), *found[1:]] if found else []


def _same(settings: Config, first: Lesson) -> Lesson:
    """Gives the lesson with the teachers, labels and loss of a first round, itself if none has."""

    def build(lesson: Lesson):
        return config.plugin("transfers", settings.transfers[lesson.transfer].kind.name).build

    for other in lessons(settings).values():
        alike = (other.sources, other.k) == (first.sources, first.k) and build(other) is build(
            first
        )
        if alike and not hasattr(_options(settings, other), "rounds"):
            if lesson_tables(settings, other) == lesson_tables(settings, first):
                return other
    return first


def _graduate(options, lesson: Lesson) -> str:
    return "~".join([options.target, *lesson.origin.split("/")])


def sources(settings: Config, lesson: Lesson) -> tuple[tuple[str, str], ...]:
    """Gives who teaches: the teachers, in a later round (also) the target of the one before."""
    options = _options(settings, lesson)
    number = lesson.round or getattr(options, "rounds", 1)
    if number == 1:
        return lesson.sources
    before = rounds(settings, lesson)[number - 2]
    kept = lesson.sources if options.keep else ()
    kind = config.plugin("transfers", settings.transfers[lesson.transfer].kind.name)
    layer = kind.teaching_layer(options, settings)
    return (*kept, (_graduate(options, before), layer))


def shown(settings: Config) -> list[tuple[str, str, int | str]]:
    """Lists teacher, layer and k of the clusters that the report may show, sorted.

    Those that teach; of a teacher's layer whose features teach, those of the first k that is given.
    """
    numbers = [k for k in settings.clusters if k != AUTO][:1]
    found = {
        (*source, k)
        for lesson in lessons(settings).values()
        for source in lesson.sources
        for k in (numbers if lesson.k == ONE else [lesson.k])
    }
    return sorted(found, key=str)  # of a number and `auto` neither is less


def all_lessons(settings: Config) -> dict[str, Lesson]:
    """Gives the lessons and those of the rounds before them, by origin."""
    judged = lessons(settings)
    before = [one for lesson in judged.values() for one in rounds(settings, lesson)]
    return {**{lesson.origin: lesson for lesson in before}, **judged}


def _options(settings: Config, lesson: Lesson):
    kind = settings.transfers[lesson.transfer].kind
    return config.options("transfers", kind.name, kind.options())


def lesson_tables(settings: Config, lesson: Lesson) -> dict[str, list[str]]:
    """Gives the files that a lesson is made of: pseudo-labels, or features and clusters."""
    module = config.plugin("transfers", settings.transfers[lesson.transfer].kind.name)
    places = _places(settings, lesson)
    split = f"{settings.use.target}-train-unlabelled.h5"
    if module.NEEDS == "labels":
        return {"labels": [f"results/pseudo_labels/{place}/{split}" for _, place in places]}
    return {
        "features": [f"results/features/{source}/{split}" for source, _ in places],
        "clusters": [f"results/clusters/{place}.h5" for _, place in places],
    }


def all_tables(settings: Config) -> set[str]:
    """Gives the features, clusters and pseudo-labels that targets are taught by, of all rounds."""
    split = f"{settings.use.cluster}-train-unlabelled.h5"
    found = set()
    for lesson in all_lessons(settings).values():
        found |= {one for paths in lesson_tables(settings, lesson).values() for one in paths}
        for source, place in _places(settings, lesson):
            found |= {f"results/features/{source}/{split}", f"results/clusters/{place}.h5"}
    return found


def _places(settings: Config, lesson: Lesson) -> list[tuple[str, str]]:
    """Gives for each clustering of a lesson the place of its features and its own."""
    module = config.plugin("transfers", settings.transfers[lesson.transfer].kind.name)
    numbers = _numbers(module, _options(settings, lesson), lesson.k)
    return [
        (f"{teacher}/{layer}", f"{teacher}/{layer}/{settings.use.cluster}/k{k}")
        for teacher, layer in sources(settings, lesson)
        for k in numbers
    ]


def _numbers(module, options, k: int | str) -> list[int | str]:
    """Gives the numbers of clusters a kind needs at k, such as `autox0.5` for half of `auto`."""
    if k != AUTO:
        return module.clusters(options, k)
    factors = (number / WHOLE for number in module.clusters(options, WHOLE))
    return [AUTO if factor == 1 else f"{AUTO}x{factor:g}" for factor in factors]


def choices(settings: Config) -> dict[str, list[str]]:
    """Gives who has something to be chosen, teachers or graduates, and among which layers."""
    found: dict[str, list[str]] = {}
    for lesson in all_lessons(settings).values():
        for name, layer in sources(settings, lesson):
            if AUTO in (lesson.k, layer):
                layers = found.setdefault(name, [])
                layers += [layer] if layer not in layers else []
    return found


def transfer_options(settings: Config, lesson: Lesson) -> list[str]:
    """Gives the options of target_train that say what is to be learned."""
    found = ["--transfer", config.dumps(settings.transfers[lesson.transfer].kind)]
    for name, paths in lesson_tables(settings, lesson).items():
        found += ["--pseudo-labels" if name == "labels" else f"--{name}", *paths]
    return found
