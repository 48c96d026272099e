"""The tables of results/ from its records, for plot.py; and what its figures need, too."""
import math
import sys
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).resolve().parent))

from parts import (ABLATIONS, ASKED, BOUNDS, FIRST, LETTER, LIMITS, METHODS, OPTIMIZERS, PAPER, PARTS,
                   SPHERES, TIGHT_RUNS, WIDTHS, as_kind, best_final, best_short, best_under, chosen_lr,
                   finals, frontier, of_kind, pairs, seeds, trained, tuning_loss, unscaled)
from constrain import RADII

LABELS = {name: name.replace("_", " ") for name in (*METHODS, "spectral_sphere", "hyperball")}
LABELS |= {"none": "weight decay", "svd_cap": "SVD cap"}
OPTIMIZER_LABELS = {"muon": "Muon", "adamw": "AdamW"}
BOUND_LABELS = dict(zip(BOUNDS, ("certified Lipschitz bound (a theorem)", "published formula (not a bound)")))
TARGETS = (2, None), (10, None), (30, 45), (300, 50), (1e4, 54)  # accuracy in %, or the best, for the presets
LARGE = {"w8": "w_max 8", "none": "no constraint", "baseline": "nanoGPT's, AdamW"}  # jobs of gpu.py
IMAGE_RADII = 36, 72, 108  # in 255ths of a pixel's range


# --- Records, and how runs are called -----------------------------------------------------------------------

def of_pair(records, method, optimizer):
    return of_kind(records, as_kind((method, optimizer)))


def by_strength(records, method, optimizer):
    """Of a pair's runs the one of the smallest training loss at each strength, weakest bound last."""
    best = {}
    for r in sorted(of_pair(records, method, optimizer), key=tuning_loss):
        options = r["options"]
        best.setdefault(-options["weight_decay"] if "weight_decay" in options else options["w_max"], r)
    return [best[strength] for strength in sorted(best)]


def by_bound(records):
    """Lists of seeds, smallest certified bound first."""
    return sorted(seeds(records), key=lambda runs: runs[0]["log10_certified"])


def papers(runs):
    """The finals of the paper's architecture with as many steps as the presets."""
    return sorted(finals(runs["equal"]), key=lambda runs: runs[0]["log10_certified"])


def first_seeds(runs):
    return trained(runs["grid"] + runs["headline"])


def longest_books(runs):
    last = max((r["options"]["max_steps"] for r in runs["books"]), default=0)
    return seeds(r for r in runs["books"] if r["options"]["max_steps"] == last)


def large_runs(runs):
    """The last of each job in LARGE, or nothing while one is missing."""
    found = [runs[f"gpu, {job}"][-1:] for job in LARGE]
    return sum(found, []) if all(found) else []


def who(options):
    tangent = ", its own steps" * options.get("tangent", False)
    return f"{OPTIMIZER_LABELS[options.get('optimizer', 'muon')]}, {LABELS[options['method']]}{tangent}"


def settings(options, known={}):
    """What sets a run apart from the others, as options of train.py, but for what is known."""
    preset = [options["preset"]] if "preset" in options and options["preset"] != known.get("preset") else []
    common = ["seed", "max_steps", "eval_interval", "eval_tokens", "preset", "tangent", "compile"]
    if "seed" in options and "preset" not in options:  # the paper's architecture, of which `who` names two
        common += ["method", "optimizer", *(name for name in PAPER if PAPER[name] == options.get(name))]
    shown = {name: f"{value:.3g}" if isinstance(value, float) else value for name, value in options.items()
             if name not in common and known.get(name) != value}
    return ", ".join([*preset, *(f"{name} {value}" for name, value in shown.items())])


def book_name(run):
    """What a run on the books is."""
    options = run["options"]
    preset = options.get("preset", "")
    if run["part"] == "nanogpt":
        return f"nanoGPT, lr {options['lr']:g}"
    if options.get("method") == "none":
        return "paper's, no constraint"
    if preset.startswith("fineweb"):
        return f"paper's, w_max {preset[9:]}"
    detail = f" at a bound of {options['logit_scale']:g}" if "logit_scale" in options else ""
    if "radius" in options:
        detail = f", radius {options['radius']:g}"
    if preset == "tight" and options.get("n_layer", 1) > 1:
        detail += f", {options['n_layer']} layers"
    return preset + detail if preset else f"paper's, soft cap at {options.get('w_max', 6):g}"


def power(log10_x):
    """A number from its log10, short: 1.7, 64, 8.1·10^4; none if it is infinite."""
    if log10_x == math.inf:
        return "none"
    return f"{10 ** log10_x:.3g}" if log10_x < 3 else f"{10 ** (log10_x % 1):.1f}·10^{math.floor(log10_x)}"


# --- Tables. A row is a list of runs that differ in their seeds, a column a function of it ------------------

def spread(values, form="{:.2%}"):
    """The mean and, of several values, the smallest and largest."""
    low, middle, high = (form.format(f(values)) for f in (min, mean, max))
    return middle if len(values) == 1 else f"{middle} ({low} to {high}, {len(values)} seeds)"


def mean_of(name, form="{:.3f}"):
    return lambda row: form.format(mean(r[name] for r in row))


def most_of(name):
    return lambda row: power(max(r[name] for r in row)) if name in row[0] else ""


def last_of(name, form="{:.3f}"):
    """Of a trace."""
    return lambda row: form.format(mean(r["trace"][name][-1] for r in row))


def option_of(name):
    return lambda row: f"{row[0]['options'][name]:g}"


def shares(value, at):
    """In percent at each of several radii; value(r, radius) is None where it was not measured."""
    def cell(row):
        found = [[value(r, x) for r in row] for x in at]
        return "" if None in found[0] else ", ".join(f"{100 * mean(values):.1f}" for values in found)
    return cell


def certified_at(r, radius):
    return r["radii"][f"{radius}"]["certified"] if "radii" in r else r.get(f"certified_acc_{radius}")


def attacked_at(r, eps):
    return r["attacked"][f"{eps}"] if "attacked" in r else r[f"attacked_acc_{eps}"]


def few(values, form=".2f"):
    """All of a few numbers, or every second one."""
    return ", ".join(f"{x:{form}}" for x in (values if len(values) < 6 else values[1::2]))


def float8_loses(row):
    lost = [r.get("float8_lost", math.nan) for r in row]
    return "" if math.isnan(lost[0]) else f"{100 * mean(lost):.2f}"


def median_radius(row):
    return f"{mean(10 ** r['log10_radii'][20] for r in row):.2g}" if "log10_radii" in row[0] else ""


def local_median(row, kind):
    """The median radius of predictions all over the text: by the constant, at the text or of an attack."""
    return f"{mean(10 ** r['local']['log10_median_alone'][kind] for r in row):.2g}"


def largest_norms(record):
    """The largest norm of a matrix, at each evaluation."""
    return [x * record["config"]["w_max"] for x in record["trace"]["norm_over_cap"]]


def largest_entries(record):
    """The largest entry behind a block, at each evaluation."""
    return list(map(max, record["trace"]["act_max_layers"]))


def changes(row):
    """Options but for what names the kind of run."""
    options = row[0]["options"]
    return settings(options, {k: options[k] for k in ("preset", "method", "optimizer") if k in options})


SMALL = 0.001, 0.003, 0.005, 0.01
RADIUS, PIXELS = "certified at 0.01, 0.03, 0.1", "certified at 36, 72, 108"
AT_TEXT, ALL = "certified at 0.001, 0.003, 0.005, 0.01 of 512", "of all characters"
COLUMNS = {
    "method": lambda row: who(row[0]["options"]),
    "model": lambda row: book_name(row[0]),
    "options": lambda row: settings(row[0]["options"]),
    "preset": lambda row: settings(row[0]["options"]),
    "changes": changes,
    "200 steps": lambda row: row[0]["name"],
    "within": lambda row: row[0]["max_bias"] or "no cap",
    "heads": option_of("n_head"), "lr": option_of("lr"), "w_max": option_of("w_max"),
    "logit_scale": option_of("logit_scale"),
    "steps": lambda row: f"{row[0]['trace']['step'][-1]:,}",
    "accuracy": lambda row: spread([r["val_acc"] for r in row]) if "val_acc" in row[0] else "not measured",
    "on 4,096": last_of("val_acc", "{:.1%}"),
    "paper protocol": mean_of("paper_protocol_acc", "{:.2%}"),
    "loss": mean_of("val_loss"),
    "training loss": last_of("train_loss"),
    "loss of the last fifth": lambda row: f"{tuning_loss(row[0]):.3f}",
    "worst-case loss": mean_of("worst_loss", "{:.2f}"),
    "in training": lambda row: f"{row[0].get('train_loss') or row[0]['trace']['train_loss'][-1]:.2f}",
    "certified": most_of("log10_certified"),
    "with a ball": most_of("log10_certified_ball"),
    "paper": most_of("log10_paper"), "published": most_of("log10_published"),
    "paper, no scale": lambda row: power(max(map(unscaled, row))),
    "attack": most_of("log10_attack"),
    "median radius": median_radius, "median certified radius": median_radius,
    RADIUS: shares(certified_at, RADII),
    AT_TEXT: shares(lambda r, x: r["local"]["certified_accuracy"][f"{x}"][1], SMALL),
    ALL: shares(lambda r, x: r.get("all_at_text", {}).get(f"{x}"), SMALL),
    "certified of 2,048": shares(lambda r, x: r["radii"][f"{x}"]["certified_first"], RADII),
    "an attack leaves": shares(lambda r, x: r["radii"][f"{x}"]["attack_first"], RADII),
    PIXELS: shares(certified_at, IMAGE_RADII),
    "attacked at 36, 72, 108": shares(attacked_at, IMAGE_RADII),
    "attacked at 36, 72, 108, 255": shares(attacked_at, (*IMAGE_RADII, 255)),
    "float8 loses": float8_loses,
    "largest entry": lambda row: f"{max(r['act_max'] for r in row):.1f}",
    "largest RMS norm": lambda row: f"{max(r['act_rms'] for r in row):.2f}",
    "training losses": lambda row: few(row[0]["trace"]["train_loss"]),
    "losses": lambda row: few(row[0]["trace"]["val_loss"]),
    "norm / w_max": last_of("norm_over_cap", "{:.2f}"),
    "largest norms": lambda row: few(largest_norms(row[0]), ".1f"),
    "largest entries": lambda row: few(largest_entries(row[0]), ",.0f"),
    "s/step": lambda row: f"{mean(r['seconds'] / r['trace']['step'][-1] for r in row):.2f}",
    "log10 certified": lambda row: f"{row[0]['log10_certified']:.1f}"}


def markdown(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)


def table(rows, *heads, **special):
    """Of COLUMNS by name, or of functions of its own."""
    columns = COLUMNS | special
    return markdown(heads, [[columns[head](row) for head in heads] for row in rows])


def numbered(rows, *parts, **special):
    """Several tables below each other, as one would be too wide, whose rows go by a number."""
    number = {id(row): i for i, row in enumerate(rows, 1)}
    special["row"] = lambda row: number[id(row)]
    return "\n".join(table(rows, "row", *heads, **special) for heads in parts)


def each(records):
    return [[r] for r in records]


def speed_tables(runs):
    yield "default", markdown(["seed", "accuracy", "paper protocol", "log10 certified", "seconds"], [
        [r["seed"], f"{r['val_acc']:.2%}", f"{r['paper_protocol_acc']:.2%}", f"{r['log10_certified']:.2f}",
         f"{r['wall_seconds']:.0f}"] for r in runs["speed, default"]])
    whole = [(what, same) for what in ("default", "default without AMX", "default that day", "default before",
                                       "tight", "tight-content") if (same := runs[f"speed, {what}"])]
    yield "what a run costs", markdown(["to the end", "seconds", "accuracy", "command"], [
        [what, spread([r["wall_seconds"] for r in same], "{:.0f}"), f"{mean(r['val_acc'] for r in same):.2%}",
         f"`{same[0]['command']}`"] for what, same in whole])
    yield "what training costs", markdown(["training alone", "seconds", "accuracy", "command"], [
        [r["name"], f"{r['trace']['seconds'][-1]:.0f}", f"{r['trace']['val_acc'][-1]:.2%}",
         f"`{r['command'].removeprefix('python ')}`"] for r in runs["speed, curve"]])
    yield "what a step costs", markdown(["bench.py", "tokens/s", "over products", "optimizer", "of peak"], [
        [f"`{r['command'].split('bench.py ')[1]}`", f"{r['tokens_per_second']:,.0f}",
         f"{r['step_over_floor']:.2f}", f"{r['optimizer_share']:.1%}", f"{r['matmul_share']:.0%}"]
        for r in runs["speed, step"]])
    yield "what a constraint costs", markdown(["constraint", "matrices", "times faster", "error"], [
        [r["method"], r["shape"], f"{r['times_svd']:g}", r["error"]] for r in runs["speed, method"]])
    names = {"certificate_default": "certificate of the default model",
             "certificate_145M": "of the 145 M model",
             "bounds_145M": "all bounds and norms of an evaluation, 145 M",
             "sigma_3072x768": "largest singular value, 3072 × 768, rounded up",
             "svdvals_3072x768": "the same by svdvals", "svdvals_3072x768_one_thread": "on one thread"}
    yield "what a bound costs", markdown(["", "seconds"], [
        [name, f"{r[key]:.3g}"] for r in runs["speed, bounds"] for key, name in names.items()])


WIDTH_COLUMNS = {"a step, s": "seconds", "Muon and constraint, s": "optimizer_seconds",
                 "the certificate, s": "certificate_seconds", "peak memory, GB": "peak_gb"}


def power_of_width(records, key):
    """The power of the width that the last three follow, by least squares."""
    x, y = ([math.log(r[name]) for r in records[-3:]] for name in ("width", key))
    return sum((a - mean(x)) * (b - mean(y)) for a, b in zip(x, y)) / sum((a - mean(x)) ** 2 for a in x)


def width_tables(runs):
    records = sorted(runs["speed, width"], key=lambda r: r["width"])
    if len(records) > 2:
        rows = [[r["width"], *(f"{r[key]:.3g}" for key in WIDTH_COLUMNS.values()),
                 f"{r['optimizer_share']:.1%}", f"{r['matmul_share']:.0%}"] for r in records]
        powers = [f"{power_of_width(records, key):.2f}" for key in WIDTH_COLUMNS.values()]
        yield "how the cost grows", markdown(
            ["width", *WIDTH_COLUMNS, "Muon's share", "of peak"], [*rows, ["power", *powers, "", ""]])


def grid_tables(runs):
    grid, first = trained(runs["grid"]), first_seeds(runs)
    yield "learning rates", markdown(["", *OPTIMIZER_LABELS.values()], [
        [LABELS[m], *(chosen_lr(as_kind((m, o)), runs["lr"]) or "unfinished"
                      for o in OPTIMIZERS)] for m in METHODS])
    of_seeds = {id(r): row for row in seeds(first + trained(runs["seeds"])) for r in row}
    for bound, label in BOUND_LABELS.items():
        yield f"frontier, {label}", numbered(
            each(frontier(first, bound)),
            ("accuracy", "loss", "paper protocol", "certified", "paper", "attack"),
            ("largest entry", "largest RMS norm", "float8 loses"), ("method", "options"),
            accuracy=lambda row: COLUMNS["accuracy"](of_seeds[id(row[0])]))
        best = lambda m, o, limit: best_under(of_pair(grid, m, o), bound, limit)
        yield f"best accuracy under a {label}", markdown(["", *(f"≤ {limit:g}" for limit in LIMITS)], [
            [who(as_kind((m, o))),
             *(f"{r['val_acc']:.2%}" if (r := best(m, o, limit)) else "none" for limit in LIMITS)]
            for m, o in pairs()])

    def reached(records, bound, limit):
        best = best_under(records, bound, limit)
        method = f", {LABELS[best['options']['method']]}" if best and records is not first else ""
        return f"{best['val_acc']:.1%}{method}" if best else "none"

    columns = first, *([r for r in grid if r["options"]["optimizer"] == o] for o in OPTIMIZERS)
    heads = "bound", "any shape and scales", "paper's, Muon", "paper's, AdamW"
    yield "tradeoff, in short", markdown(heads, [
        [f"{bound[6:]} ≤ {limit:g}", *(reached(records, bound, limit) for records in columns)]
        for bound, limit in ASKED])
    balls = {r["options"]["w_max"]: r for r in runs["ball"]}
    yield "attack, in short", table(
        each(balls.get(r["options"]["w_max"], {}) | r for r in of_pair(grid, "soft_cap", "muon")),
        "w_max", "accuracy", "attack", "certified", "with a ball", "paper")
    yield "activations and float8", table(
        each(found[i] for m, o in pairs() for i in (2, -1) if len(found := by_strength(grid, m, o)) > 2),
        "method", "changes", "largest entry", "largest RMS norm", "accuracy", "float8 loses")


def sphere_kinds(runs):
    """[(kind, its runs of the grid)] of the constraints of 2026, and of the paper's with Muon."""
    paper = [(as_kind((m, "muon")), trained(runs["grid"])) for m in METHODS]
    kinds = paper + [(kind, trained(runs["sphere-grid"])) for kind in SPHERES]
    return [(kind, of_kind(records, kind)) for kind, records in kinds]


def transfer_kinds(runs):
    """[(who, runs, smallest learning rate first)] of the part "transfer"."""
    kinds = {}
    for r in sorted(runs["transfer"], key=lambda r: r["options"]["lr"]):
        kinds.setdefault(who(r["options"]), []).append(r)
    return list(kinds.items())


def sphere_tables(runs):
    kinds = sphere_kinds(runs)
    best = lambda found, limit: best_under(found, "log10_certified", limit)
    yield "spheres, best accuracy under a certified bound", markdown(["", *(f"≤ {x:g}" for x in LIMITS)], [
        [who(kind).removeprefix("Muon, "),
         *(f"{r['val_acc']:.2%}" if (r := best(found, limit)) else "none" for limit in LIMITS)]
        for kind, found in kinds if found])
    yield "spheres, grid", table(
        each(r for kind, found in kinds if "tangent" in kind for r in found), "method", "changes",
        "accuracy", "loss", "certified", "attack", "largest entry")
    yield "spheres, learning rates at three widths", markdown(
        ["", *(f"{width}, lr / 2, 1, 2" for width in WIDTHS)], [
            [method, *(" ".join(f"{tuning_loss(r):.3f}" for r in found if r["options"]["n_embd"] == width)
                       for width in WIDTHS)] for method, found in transfer_kinds(runs)])
    yield "spheres, 1,200 steps", table(
        by_bound(trained(runs["sphere-final"])), "method", "changes", "accuracy", "loss", "certified",
        "attack", "median radius", "largest entry", "s/step")
    by_loss = sorted(seeds(trained(runs["sphere-books"])), key=lambda row: row[0]["val_loss"])
    yield "spheres, books", table(by_loss, "method", "lr", "accuracy", "loss", "certified", "attack",
                                  "an attack leaves", "largest norms", "largest entry")
    of_preset = lambda row: "tight-radius" if "radius" in row[0]["options"] else "tight"
    yield "spheres, in the tight presets", table(
        sorted(seeds(trained(runs["sphere-tight"])), key=of_preset), "preset", "method", "lr", "accuracy",
        "loss", "attack", RADIUS, "an attack leaves", preset=of_preset)


def headline_tables(runs):
    yield "headline, 1,200 steps", numbered(
        papers(runs), ("certified", "paper", "attack", "paper, no scale", "with a ball", "accuracy"),
        ("options", "loss", "median radius"))
    yield "headline, 65 million characters", table(
        each(runs["long"] + runs["longest"]), "heads", "lr", "steps", "on 4,096", "accuracy", "training loss",
        "paper, no scale", "paper", "certified")
    yield "headline, search", table(
        each(best_short(runs["short"])), "method", "heads", "logit_scale", "lr", "loss of the last fifth",
        "paper, no scale", "certified")


def published_tables(runs):
    yield "published, search", table(
        each(runs["published-search"] + runs["published-long"]), "changes", "characters", "training loss",
        "on 32,768", "published", "certified", **{
            "changes": lambda row: row[0]["name"], "characters": lambda row: f"{row[0]['characters']:,}",
            "on 32,768": lambda row: f"{row[0]['val_acc']:.1%}",
            "training loss": lambda row: f"{row[0]['train_loss_last_tenth']:.3f}"})
    known = PARTS["letter"].complete(LETTER) | {"preset": None}
    yield "published, one change", table(
        each(runs["letter"] + runs["letter-long"]), "changes", "steps", "training loss", "accuracy",
        "published", "paper", "certified", "attack",
        changes=lambda row: settings(row[0]["options"] | {"preset": None}, known) or "none")
    yield "published, a head of norm 10^-8", table(
        seeds(runs["published-whole"]), "accuracy", "paper protocol", "loss", "published", "paper",
        "certified")


def deciding_tables(runs):
    rows = []
    for run in runs["deciding"]:
        found = run["deciding"]
        for name, what in (("decided", "right and decided"), ("alone", "of a sample: decided"),
                           ("attack", "of it: an attack leaves")):
            rows.append([run["name"], what, *(f"{x:.1%}" for x in found[name].values())])
    sizes = [*runs["deciding"][0]["deciding"]["decided"]]
    yield "deciding", markdown(["model", "by the last", *sizes], rows)
    yield "deciding, in short", markdown(["by the last", *sizes], [
        row[:1] + row[2:] for row in rows if row[1] == "right and decided"])


def tight_tables(runs):
    presets, robust = by_bound(runs["tight"]), by_bound(runs["robust"])
    short = [row for row in presets if row[0]["options"].get("logit_scale") != 29]  # it gains nothing
    yield "tight, in short", table(short, "preset", "certified", "attack", "accuracy",
                                   "median certified radius")
    yield "tight, at several bounds", numbered(presets, (
        "accuracy", "loss", "paper protocol", "certified", "attack", "median radius", "float8 loses"),
        ("options", ))
    known = PARTS["farther"].complete(TIGHT_RUNS[0])
    farther = of_kind(runs["tight"], known) + runs["farther"] + runs["bands"]
    yield "tight, farther", table(
        each(farther), "changes", "accuracy", "loss", "training loss", "attack", RADIUS,
        changes=lambda row: row[0].get("name") or settings(row[0]["options"], known) or "none")
    yield "tight, trained for a radius", numbered(presets + robust, (
        "accuracy", RADIUS, "an attack leaves", "certified of 2,048", "certified"),
        ("options", "steps", "loss"))
    yield "tight, a capped output matrix", numbered(by_bound(trained(runs["weighed"] + runs["gce"])), (
        "accuracy", RADIUS, "an attack leaves", "certified of 2,048", "loss"), ("options", "steps"))
    yield "tight, scores of distance", table(each(runs["max_bias"]), "within", "accuracy", RADIUS, "loss",
                                             "in training", "worst-case loss")
    by_radius = sorted(runs["radius"], key=lambda r: (r["options"]["radius"], r["options"]["logit_scale"]))
    yield "tight, search for a radius", table(each(by_radius), "changes", "accuracy", RADIUS, "in training",
                                              "worst-case loss")
    for name, records, *more in (("tight-content, radii at the text", runs["at-text"] + runs["wide"], ALL),
                                 ("radii, rows apart", runs["rows-apart"]),
                                 ("radii without tracing", runs["attacked"])):
        yield name, table(
            by_bound(records), "preset", "steps", "accuracy", "certified", "by the constant",
            "at the text", "an attack needs", AT_TEXT, *more, **{
                "steps": lambda row: f"{row[0]['options']['max_steps']:,}",
                "by the constant": lambda row: local_median(row, "constant"),
                "at the text": lambda row: local_median(row, "local"),
                "an attack needs": lambda row: local_median(row, "attack")})
    content = sorted(runs["content"], key=lambda r: (r["options"].get("radius", 0), r["log10_certified"]))
    yield "tight-content, search", table(each(content), "changes", "accuracy", "certified", RADIUS)
    rows, candidates = [], (presets, papers(runs))
    for limit, target in TARGETS:
        both = [best_final(lists, "log10_certified", limit) for lists in candidates]
        if all(both):
            reached, paper = (mean(r["val_acc"] for r in row) for row in both)
            aim = ["the best", ""] if target is None else [f"{target} %", f"{100 * reached - target:.1f}"]
            rows.append([f"≤ {limit:g}", aim[0], f"{reached:.1%}", aim[1], f"{paper:.1%}"])
    yield "tight, against its targets", markdown(
        ["certified bound", "target", "reached", "above it by", "the paper's architecture reaches"], rows)
    yield "tight, what each change does", table(
        each(r | {"name": f"{start} {settings(change)}".strip()} for start, change, options in ABLATIONS
             for r in runs["ablation"] if r["options"] == PARTS["ablation"].complete(options)),
        "200 steps", "accuracy", "certified", "attack")


def cifar_tables(runs):
    grid = runs["cifar-grid"]
    yield "CIFAR-10", numbered(
        seeds(runs["cifar"]), ("steps", "accuracy", "training loss", PIXELS, "attacked at 36, 72, 108",
                               "certified"), ("options", ))
    cell = lambda r: f"{r['val_acc']:.1%} at {power(r['log10_certified'])}" if "val_acc" in r else "diverged"
    yield "CIFAR-10, accuracy and bound", markdown(["", "lr", "strongest constraint", "", "", "weakest"], [
        [who(as_kind((m, o))), chosen_lr(as_kind((m, o)), runs["cifar-lr"]),
         *map(cell, by_strength(grid, m, o))] for m, o in pairs()])
    yield "CIFAR-10, pairs of equal accuracy", numbered(
        seeds(runs["cifar-pairs"]), ("accuracy", "certified", PIXELS, "attacked at 36, 72, 108, 255"),
        ("method", "changes"))


def books_tables(runs):
    rows = sorted(seeds(runs["books"]), key=lambda row: (book_name(row[0]), row[0]["options"]["max_steps"]))
    yield "books", table(rows, "model", "steps", "accuracy", "certified", "attack", "float8 loses")
    yield "books, radii", table(rows, "model", "steps", "median radius", RADIUS, "an attack leaves",
                                "certified of 2,048")
    yield "books, training", table(rows, "model", "steps", "training loss", "loss", "largest entry")
    yield "GPT-2 tokens, longer", table(
        each(runs["tokens"] + runs["nanogpt"]), "model", "accuracy", "loss", "in training", "largest entry",
        "certified", "attack", "median radius", "float8 loses", **{"in training": COLUMNS["training loss"]})
    for part, title, known in (("smoke", "GPT-2 tokens, narrow", PARTS["smoke"].common),
                               ("wikitext", "WikiText-2", PARTS["wikitext"].common | FIRST)):
        name = {"run": lambda row: settings(row[0]["options"], known) or "the first run"}
        yield title, "\n".join(table(each(runs[part]), "run", *heads, **name) for heads in (
            ("training losses", "losses"), ("norm / w_max", "largest entries", "log10 certified")))


def large_tables(runs):
    rows = each(large_runs(runs))
    if rows:
        yield "145 M parameters", table(
            rows, "model", "accuracy", "loss", "largest entry", "certified", "paper", "tokens/s",
            **{"model": lambda row: LARGE[row[0]["job"]],
               "paper": lambda row: most_of("log10_paper")(row) if row[0]["log10_paper"] is not None else "",
               "tokens/s": lambda row: f"{row[0]['tokens_per_second']:,.0f}"})


def all_tables(runs):
    """{title: Markdown}."""
    makers = (speed_tables, width_tables, grid_tables, sphere_tables, headline_tables, published_tables,
              deciding_tables, tight_tables, cifar_tables, books_tables, large_tables)
    return dict(made for make in makers for made in make(runs))
