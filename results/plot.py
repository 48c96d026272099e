"""
Draw the figures of results/ from its records, and print the tables of results/README.md and README.md.

    pip install matplotlib && python results/plot.py              # all figures
    python results/plot.py --tables                               # the tables alone, in Markdown
"""
import math
import re
from statistics import mean

from sweep import (ABLATION_RUNS, ABLATIONS, ASKED, BOOKS, BOOKS_STEPS, BOUNDS, CIFAR, FIRST, LIMITS, METHODS, NARROW, OPTIMIZERS,
                   PAPER, RESULTS, TIGHT, WIKITEXT, UserError, best_final, best_of, best_under, chosen_lr, complete, finals, frontier,
                   image_strengths, pairs, read, same_but_seed, searched, strengths, tuning_loss)
from sweep import unscaled as unscaled_bound
from constrain import RADII
from prepare import Parser, one_line_errors, say  # sweep has made the folder above known

# Okabe and Ito's colours, which the colour-blind can tell apart; grey for their yellow, which is faint on white.
COLORS = dict(zip(METHODS, ("#0072B2", "#009E73", "#000000", "#56B4E9", "#E69F00", "#CC79A7", "#999999", "#D55E00")))
LABELS = {name: name.replace("_", " ") for name in METHODS} | {"none": "weight decay", "svd_cap": "SVD cap"}
LINES = {"muon": dict(linestyle="-", marker="o"), "adamw": dict(linestyle=":", marker="s", markerfacecolor="white")}
OPTIMIZER_LABELS = {"muon": "Muon", "adamw": "AdamW"}
BOUND_LABELS = dict(zip(BOUNDS, ("certified Lipschitz bound (a theorem)", "published formula (not a bound)")))
TARGETS = ((2, None), (10, None), (30, 45), (300, 50), (1e4, 54))  # accuracy in %, or the best, for the presets
WIDEST = 20  # log10 of the largest bound that is drawn


def of_pair(records, method, optimizer):
    return [r for r in records if (r["options"]["method"], r["options"]["optimizer"]) == (method, optimizer)]


def of_strength(grid, method, optimizer, strength):
    """The run of a pair at a strength, at the learning rate of the smallest training loss; None if there is none."""
    runs = (r for r in of_pair(grid, method, optimizer) if strength.items() <= r["options"].items())
    return min(runs, key=tuning_loss, default=None)


def drawn_frontier(records, bound):
    return [r for r in frontier(records, bound) if r[bound] <= WIDEST]


def plain(ax):
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)


def optimizer_handles(plt):
    """Of a legend."""
    return [plt.Line2D([], [], color="black", label=OPTIMIZER_LABELS[o], **LINES[o]) for o in OPTIMIZERS]


def tradeoff(records, plt):
    """
    Accuracy and loss against both bounds: what every method and optimizer reaches with the paper's shape, dominated runs left
    out, and in grey what the search over shapes and scales reaches with soft cap and Muon.
    """
    figure, axes = plt.subplots(2, 2, figsize=(11, 8), sharex=True, sharey="row", layout="constrained")
    grid = searched(records, "grid")

    def line(column, runs, bound, **look):
        points = drawn_frontier(runs, bound)
        for ax, y, unit in zip(column, ("val_acc", "val_loss"), (100, 1)):
            ax.plot([10 ** r[bound] for r in points], [r[y] * unit for r in points], **look)

    for (bound, label), column in zip(BOUND_LABELS.items(), axes.T):
        line(column, searched(records, "headline"), bound, color="#DDDDDD", linewidth=6)
        for method, optimizer in pairs():
            line(column, of_pair(grid, method, optimizer), bound, color=COLORS[method], markersize=5, linewidth=1.5,
                 **LINES[optimizer])
        column[-1].set_xlabel(label)
        for ax in column:
            ax.set_xscale("log")
            plain(ax)
    axes[0, 0].set_ylabel("accuracy on the validation split, %")
    axes[1, 0].set_ylabel("validation loss, nats per character")
    handles = [plt.Line2D([], [], color=COLORS[m], linewidth=3, label=LABELS[m]) for m in METHODS] + optimizer_handles(plt)
    handles += [plt.Line2D([], [], color="#DDDDDD", linewidth=6, label="best of other shapes")]
    figure.legend(handles=handles, loc="outside right center", frameon=False)
    return figure


def norms(records, plt):
    """The largest norm of a matrix over training at the middle strength, for every method, and the cap where there is one."""
    figure, axes = plt.subplots(2, 4, figsize=(11, 5), sharex=True, sharey=True, layout="constrained")
    for method, ax in zip(METHODS, axes.flat):
        for optimizer in OPTIMIZERS:
            if run := of_strength(searched(records, "grid"), method, optimizer, strengths(method, optimizer)[2]):
                ax.plot(run["trace"]["step"], [x * run["config"]["w_max"] for x in run["trace"]["norm_over_cap"]],
                        color=COLORS[method], markersize=4, **LINES[optimizer])
        if cap := strengths(method, "muon")[2].get("w_max"):
            ax.axhline(cap, color="black", linewidth=0.8, linestyle="--")
        ax.set_title(LABELS[method], fontsize=10)
        ax.set_yscale("log", base=2)
        ax.yaxis.set_major_formatter("{x:g}")
        plain(ax)
    figure.supxlabel("step")
    figure.supylabel("largest RMS→RMS norm of a matrix")
    handles = optimizer_handles(plt) + [plt.Line2D([], [], color="black", linewidth=0.8, linestyle="--", label="w_max")]
    figure.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False)
    return figure


def seeds(records, part):
    """The runs of a part, a list of the seeds of each choice of options."""
    kinds = {}
    for r in (r for r in records if r["part"] == part):
        kinds.setdefault(str(sorted((r["options"] | {"seed": 0}).items())), []).append(r)
    return list(kinds.values())


def by_bound(runs):
    """Lists of seeds, smallest certified bound first."""
    return sorted(runs, key=lambda seeds: seeds[0]["log10_certified"])


def levels(tight, part="tight"):
    """The runs of the presets, a list of the seeds of each choice of options, smallest bound first."""
    return by_bound(seeds(tight, part))


def headline(records, plt):
    """Accuracy over training of the paper's shape under a published bound of 2: 500 steps of 131,072 characters, and more of fewer."""
    figure, ax = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    for run in (r for r in records if r["part"] in ("long", "longest")):
        o = run["options"]
        millions = [step * o["batch_size"] * 256 / 1e6 for step in run["trace"]["step"]]
        line = "--" if o["max_steps"] > 500 else "-" if o["lr"] > 0.03 else ":"
        ax.plot(millions, [100 * accuracy for accuracy in run["trace"]["val_acc"]], linestyle=line,
                color={32: "#0072B2", 64: "#D55E00"}[o["n_head"]],
                label=f"{o['n_head']} heads, lr {o['lr']:g}, {o['max_steps']:,} steps: published {10 ** unscaled_bound(run):.2f}, "
                      f"certified {math_power(run['log10_certified'])}")
    ax.axhline(60, color="black", linewidth=0.8, linestyle="--")
    ax.annotate("the paper's 60 %, at a bound of 2", (5, 59.5), fontsize=9, va="top")
    ax.set_xlabel("characters trained on, millions")
    ax.set_ylabel("accuracy on 4,096 characters, %")
    ax.set_ylim(20, 62)
    plain(ax)
    ax.legend(frameon=False, fontsize=9)
    return figure


def certified_curve(run):
    """Radii, the quantiles of the right predictions' that a record has, and the % of all certified at each."""
    radii = [10 ** x for x in run["log10_radii"]]
    return radii, [100 * run["val_acc"] * (1 - j / (len(radii) - 1)) for j in range(len(radii))]


def radius(records, plt):
    """Certified accuracy against the radius, linear and log: the headline's models and the presets'."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    papers = [runs[0] for runs in by_bound(finals(records, "equal"))]
    families = ((papers, "paper's architecture", "Blues_r", "-"),
                ([runs[0] for runs in levels(read(TIGHT))], "presets", "Oranges_r", "--"),
                ([runs[0] for runs in levels(read(TIGHT), "robust") if len(runs) > 1], "trained for a radius; ×: attacked",
                 "Greens_r", "-."))
    for runs, name, colors, line in families:
        for i, run in enumerate(runs):
            color = plt.get_cmap(colors)(0.7 * i / len(runs))
            radii, share = certified_curve(run)
            for ax in axes:
                ax.plot([1e-12, radii[0], *radii], [share[0], share[0], *share], line, color=color,
                        label=name if i == 0 else None)
            at = 20 if runs is not papers else 10 + 5 * i  # labels at other heights, so that they stay apart
            label = math_power(run["log10_certified"])
            for ax in axes if radii[at] > 0.004 else axes[1:]:
                ax.annotate(label, (radii[at], share[at]), (3, 3), textcoords="offset points", color=color, fontsize=8)
            for ax in axes if name.endswith("attacked") else ():
                ax.plot([float(r) for r in run["radii"]], [100 * at["attack_first"] for at in run["radii"].values()], "x", color=color)
    axes[0].set_xlim(0, 0.2)
    axes[1].set_xscale("log")
    axes[1].set_xlim(1e-11, 1)
    axes[0].set_ylabel("certified accuracy, %")
    for ax in axes:
        ax.set_xlabel("radius: change of any embeddings, in RMS norm")
        plain(ax)
    axes[0].legend(frameon=False, fontsize=9, title="curves are named by their certified bound", title_fontsize=9)
    return figure


def tight(records, plt):
    """The presets' accuracy against the certified bound, beside the paper's architecture with as many steps, means of three seeds."""
    figure, ax = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    papers = by_bound(finals(records, "equal"))
    for name, points, look in (("paper's architecture", papers, dict(color="#0072B2", marker="o")),
                               ("presets tight and tight-content", levels(read(TIGHT)), dict(color="#D55E00", marker="s"))):
        accuracy = [100 * mean(r["val_acc"] for r in runs) for runs in points]
        at = lambda bound: [10 ** max(r[bound] for r in runs) for runs in points]
        ax.plot(at("log10_certified"), accuracy, label=f"{name}: certified", **look)
        ax.plot(at("log10_attack"), accuracy, label="the same models: attack", linestyle=":", markerfacecolor="white", **look)
    ax.set_xscale("log")
    ax.set_xlabel("Lipschitz constant, embeddings to logits")
    ax.set_ylabel("accuracy on the validation split, %")
    plain(ax)
    ax.legend(frameon=False)
    return figure


def cifar(records, plt):
    """
    On images: accuracy against the bound, every method and optimizer at four strengths; and what the attack leaves against its
    radius of models of equal accuracy, one unconstrained and one constrained, means of three seeds.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    records = read(CIFAR)
    grid = [r for r in records if r["part"] == "cifar-grid" and "val_acc" in r]
    for method, optimizer in pairs():
        runs = [r for r in image_runs(grid, method, optimizer) if r]
        left.plot([10 ** r["log10_certified"] for r in runs], [100 * r["val_acc"] for r in runs], color=COLORS[method],
                  markersize=5, linewidth=1.5, **LINES[optimizer])
    left.set_xscale("log")
    left.set_xlabel("certified Lipschitz bound, pixels to logits")
    left.set_ylabel("accuracy on the test images, %")
    for runs, color in zip(seeds(records, "cifar-pairs"), ("#0072B2", "#56B4E9", "#D55E00", "#E69F00")):
        options, radii = runs[0]["options"], [int(eps) for eps in runs[0]["attacked"]]
        strength = options.get("weight_decay", options.get("w_max"))
        free = f"{LABELS[options['method']]} {strength:g}" if strength else "unconstrained"
        bound = math_power(max(r["log10_certified"] for r in runs))
        right.plot(radii, [100 * mean(r["attacked"][str(eps)] for r in runs) for eps in radii], color=color,
                   label=f"{OPTIMIZER_LABELS[options['optimizer']]}, {free}: bound {bound}", **LINES[options["optimizer"]])
    right.set_xlabel("radius of the attack, L2 norm of a change of the pixels, 255ths")
    right.set_ylabel("accuracy that it leaves, %")
    right.legend(frameon=False, fontsize=9)
    for ax in (left, right):
        plain(ax)
    handles = [plt.Line2D([], [], color=COLORS[m], linewidth=3, label=LABELS[m]) for m in METHODS] + optimizer_handles(plt)
    figure.legend(handles=handles, loc="outside left center", frameon=False)
    return figure


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
    bound = f" at a bound of {options['logit_scale']:g}" if "logit_scale" in options else ""
    return preset + bound if preset else f"paper's, soft cap at {options.get('w_max', 6):g}"


def activations(records, plt):
    """GPT-2 tokens: the largest entry and the largest RMS norm of a token's vector behind every block, over training."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    runs = read(BOOKS)
    of_part = lambda part: [r for r in runs if r["part"] == part]
    best_nanogpt = sorted(of_part("nanogpt"), key=lambda r: r["val_loss"])[:1]
    for run, color in zip(of_part("tokens") + best_nanogpt, COLORS.values()):
        for ax, kind in zip(axes, ("act_max_layers", "act_rms_layers")):
            for i, layer in enumerate(zip(*run["trace"][kind])):
                ax.plot(run["trace"]["step"], layer, color=color, linewidth=1 + 0.5 * i, label=None if i else book_name(run))
    for ax, label in zip(axes, ("largest entry", "largest RMS norm of a token")):
        ax.set_xlabel("step of 8,192 tokens; deeper layers thicker")
        ax.set_ylabel(f"{label} behind a block")
        ax.set_yscale("log", base=2)
        ax.yaxis.set_major_formatter("{x:g}")
        plain(ax)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=5, frameon=False)
    return figure


def speed(records, plt):
    """Accuracy on the whole validation split of Shakespeare against seconds of training on two cores, beside nanoGPT."""
    figure, ax = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    for run, color in zip((r for r in read(RESULTS / "speed.jsonl") if r["what"] == "curve"), COLORS.values()):
        ax.plot(run["trace"]["seconds"], [100 * accuracy for accuracy in run["trace"]["val_acc"]], "o-", markersize=4, color=color,
                label=run["name"])
    ax.set_xlabel("seconds of training on two cores, compiling included, evaluations not")
    ax.set_ylabel("accuracy on the validation split, %")
    plain(ax)
    ax.legend(frameon=False)
    return figure


def longest_books(records):
    """The runs on the most of the books, by character, a list of the seeds of each model."""
    return [runs for runs in seeds(records, "books") if runs[0]["options"]["max_steps"] == max(BOOKS_STEPS)]


def books(records, plt):
    """On a hundred times Shakespeare's text: accuracy over the longest runs, and at their ends certified accuracy against the radius."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for (run, *_), color in zip(longest_books(read(BOOKS)), COLORS.values()):
        name = f"{book_name(run)}: {math_power(run['log10_certified'])}"
        millions = [step * 16 * 256 / 1e6 for step in run["trace"]["step"]]
        left.plot(millions, [100 * accuracy for accuracy in run["trace"]["val_acc"]], color=color, label=name)
        radii, share = certified_curve(run)
        right.plot([1e-15, radii[0], *radii], [share[0], share[0], *share], color=color)
        right.plot([float(r) for r in run["radii"]], [100 * at["attack_first"] for at in run["radii"].values()], "x", color=color)
    left.set_xlabel("characters trained on, millions")
    left.set_ylabel("accuracy on 32,768 characters, %")
    left.set_ylim(bottom=30)
    right.set_xscale("log")
    right.set_xlim(1e-12, 1)
    right.set_xlabel("radius: change of any embeddings, in RMS norm; ×: attacked")
    right.set_ylabel("certified accuracy, %")
    for ax in (left, right):
        plain(ax)
    left.legend(frameon=False, fontsize=9, title="model: certified bound", title_fontsize=9)
    return figure


# ----------------------------------------------------------------------------------------------------------------------
# Tables

def power(log10_x):
    """A number from its log10, short: 1.7, 64, 8.1·10^4."""
    if log10_x < 3:
        return f"{10 ** log10_x:.3g}"
    return f"{10 ** (log10_x % 1):.1f}·10^{math.floor(log10_x)}"


def math_power(log10_x):
    """The same for matplotlib."""
    return re.sub(r"·10\^(\d+)", r"$\\cdot 10^{\1}$", power(log10_x))


def settings(options):
    """What sets a run apart from the others, as options of train.py."""
    preset = [options["preset"]] if "preset" in options else []
    common = ["seed", "max_steps", "eval_interval", "eval_tokens", "preset"]
    if "seed" in options and not preset:  # all options of a run of the paper's architecture, of which `who` names two
        common += ["method", "optimizer", *(name for name in PAPER if PAPER[name] == options.get(name))]
    shown = {name: f"{value:.3g}" if isinstance(value, float) else value for name, value in options.items()
             if name not in common}
    return ", ".join([*preset, *(f"{name} {value}" for name, value in shown.items())])


def table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


def who(options):
    return f"{OPTIMIZER_LABELS[options['optimizer']]}, {LABELS[options['method']]}"


def unscaled(runs):
    """The published formula as the authors count, without the scale of the logits."""
    return power(max(map(unscaled_bound, runs)))


def float8(runs):
    """The points of accuracy that float8 costs."""
    return f"{100 * mean(r['float8_lost'] for r in runs):.2f}" if "float8_lost" in runs[0] else "not measured"


def median_radius(runs):
    return f"{mean(10 ** r['log10_radii'][20] for r in runs):.2g}"


def at(run, radius):
    """Certified accuracy at a radius."""
    return run["radii"][str(radius)]["certified"]


def left(runs):
    """What an attack leaves beside what is certified, on the same tokens."""
    both = [[mean(r["radii"][str(radius)][name] for r in runs) for name in ("certified_first", "attack_first")] for radius in RADII]
    return ", ".join(f"{100 * attack:.1f} ({100 * certified:.1f})" for certified, attack in both)


def spread(values, form="{:.2%}"):
    """The mean and, of several values, the smallest and largest."""
    middle = form.format(mean(values))
    return middle if len(values) == 1 else f"{middle} ({form.format(min(values))} to {form.format(max(values))}, {len(values)} seeds)"


def tables(records):
    first, grid = searched(records), searched(records, "grid")
    yield "learning rates", table(["", *(OPTIMIZER_LABELS[o] for o in OPTIMIZERS)],
                                  [[LABELS[m], *(chosen_lr((m, o), records) or "unfinished" for o in OPTIMIZERS)] for m in METHODS])
    if not first:
        return
    for bound, label in BOUND_LABELS.items():
        yield f"frontier, {label}", table(
            ["", "options", "accuracy", "loss", "paper protocol", "certified", "paper", "attack", "activations", "float8 loses"],
            [[who(r["options"]), settings(r["options"]), spread([s["val_acc"] for s in same_but_seed(records, r["options"])]),
              f"{r['val_loss']:.3f}",
              f"{r['paper_protocol_acc']:.2%}", power(r["log10_certified"]), power(r["log10_paper"]), power(r["log10_attack"]),
              f"{r['act_max']:.1f}, {r['act_rms']:.2f}", float8([r])]
             for r in frontier(first, bound)])
        yield f"best accuracy under a {label}, every pair of the grid", table(
            ["", *(f"≤ {limit:g}" for limit in LIMITS)],
            [[who({"method": m, "optimizer": o}), *(f"{b['val_acc']:.2%}" if (b := best_under(of_pair(grid, m, o), bound, limit))
                                                   else "none" for limit in LIMITS)] for m, o in pairs()])
    if equal := finals(records, "equal"):
        largest = lambda runs, bound: power(max(r[bound] for r in runs))
        yield "headline, 1,200 steps", table(
            ["certified", "paper", "attack", "paper without logit_scale", "certified with a ball", "accuracy", "loss",
             "median certified radius", "options"],
            [[*(largest(runs, bound) for bound in (*BOUNDS, "log10_attack")), unscaled(runs), largest(runs, "log10_certified_ball"),
              spread([r["val_acc"] for r in runs]), spread([r["val_loss"] for r in runs], "{:.3f}"), median_radius(runs),
              settings(runs[0]["options"])] for runs in by_bound(equal)])
    of_optimizer = [[r for r in grid if r["options"]["optimizer"] == o] for o in OPTIMIZERS]

    def reached(runs, bound, limit):
        best = best_under(runs, bound, limit)
        method = f", {LABELS[best['options']['method']]}" if best and runs is not first else ""
        return f"{best['val_acc']:.1%}{method}" if best else "none"

    yield "tradeoff, in short", table(
        ["bound", "any shape and scales", "paper's, Muon", "paper's, AdamW"],
        [[f"{bound[6:]} ≤ {limit:g}", *(reached(runs, bound, limit) for runs in (first, *of_optimizer))] for bound, limit in ASKED])
    if long := [r for r in records if r["part"] in ("long", "longest")]:
        yield "headline, 65 million characters", table(
            ["heads", "lr", "steps", "accuracy on 4,096 characters", "of the whole split", "training loss", "paper without logit_scale",
             "paper", "certified"],
            [[r["options"]["n_head"], r["options"]["lr"], f"{r['options']['max_steps']:,} of {r['options']['batch_size']}",
              f"{r['trace']['val_acc'][-1]:.1%}", f"{r['val_acc']:.2%}" if "val_acc" in r else "not measured",
              f"{r['trace']['train_loss'][-1]:.3f}", unscaled([r]), power(r["log10_paper"]), power(r["log10_certified"])] for r in long])
        yield "headline, search", table(
            ["", "heads", "logit_scale", "lr", "training loss", "paper without logit_scale", "certified"],
            [[LABELS[r["options"]["method"]], *(f"{r['options'][name]:g}" for name in ("n_head", "logit_scale", "lr")),
              f"{tuning_loss(r):.3f}", unscaled([r]), power(r["log10_certified"])] for r in best_of("short", "method", "n_head")])
    yield "activations and float8", table(
        ["", "options", "largest entry", "largest RMS norm", "accuracy", "float8 loses"],
        [[who(r["options"]), settings(r["options"]), f"{r['act_max']:.1f}", f"{r['act_rms']:.2f}", f"{r['val_acc']:.2%}",
          float8([r])]
         for m, o in pairs() for i in (2, -1) if (r := of_strength(grid, m, o, strengths(m, o)[i]))])


def tight_tables(records, papers):
    presets = levels(records)
    certified, attacked = ([power(max(r[bound] for r in runs)) for runs in presets] for bound in ("log10_certified", "log10_attack"))
    accuracy = [spread([r["val_acc"] for r in runs]) for runs in presets]
    radii = [median_radius(runs) for runs in presets]
    options = [settings(runs[0]["options"]) for runs in presets]
    yield "tight, in short", table(["preset", "certified", "attack", "accuracy", "median certified radius"],
                                   zip(options, certified, attacked, accuracy, radii))
    yield "tight, at several bounds", table(
        ["preset", "accuracy", "loss", "paper protocol", "certified", "attack", "median certified radius", "float8 loses"],
        [[options[i], accuracy[i], spread([r["val_loss"] for r in runs], "{:.3f}"),
          spread([r["paper_protocol_acc"] for r in runs]), certified[i], attacked[i], radii[i],
          float8(runs)]
         for i, runs in enumerate(presets)])
    robust = levels(records, "robust")
    if robust:
        yield "tight, trained for a radius", table(
            ["preset", "steps", "accuracy", *(f"certified at {r}" for r in RADII), "attack leaves", "loss", "certified bound"],
            [[settings(runs[0]["options"]), f"{runs[0]['options']['max_steps']:,}", spread([r["val_acc"] for r in runs], "{:.1%}"),
              *(spread([at(r, radius) for r in runs], "{:.1%}") for radius in RADII), left(runs),
              f"{mean(r['val_loss'] for r in runs):.3f}", power(max(r["log10_certified"] for r in runs))]
             for runs in [*presets, *robust]])
    if caps := [r for r in records if r["part"] == "max_bias"]:
        yield "tight, scores of distance", table(
            ["within", "accuracy", *(f"certified at {r}" for r in RADII), "loss", "worst-case loss, training", "validation"],
            [[r["max_bias"] or "no cap", f"{r['val_acc']:.1%}", *(f"{r[f'certified_acc_{radius}']:.1%}" for radius in RADII),
              f"{r['val_loss']:.3f}", f"{r['train_loss']:.2f}", f"{r['worst_loss']:.2f}"] for r in caps])
    if search := [r for r in records if r["part"] == "radius"]:
        yield "tight, search for a radius", table(
            ["", "accuracy", *(f"certified at {r}" for r in RADII), "worst-case loss, training", "validation"],
            [[settings({name: value for name, value in r["options"].items() if name != "preset"}), f"{r['val_acc']:.1%}",
              *(f"{r[f'certified_acc_{radius}']:.1%}" for radius in RADII), f"{r['trace']['train_loss'][-1]:.2f}",
              f"{r['worst_loss']:.2f}"]
             for r in sorted(search, key=lambda r: (r["options"]["radius"], r["options"]["logit_scale"]))])
    if search := [r for r in records if r["part"] == "content"]:
        yield "tight-content, search", table(
            ["", "accuracy", "certified", *(f"certified at {r}" for r in RADII[:2])],
            [[settings({name: value for name, value in r["options"].items() if name != "preset"}), f"{r['val_acc']:.1%}",
              power(r["log10_certified"]),
              *(f"{r[f'certified_acc_{radius}']:.1%}" if r["options"].get("radius") else "" for radius in RADII[:2])]
             for r in sorted(search, key=lambda r: (r["options"].get("radius", 0), r["log10_certified"]))])
    rows, candidates = [], (presets, finals(papers, "equal"))
    for limit, target in TARGETS:
        both = [best_final(runs, "log10_certified", limit) for runs in candidates]
        if all(both):
            reached, paper = (mean(r["val_acc"] for r in runs) for runs in both)
            aim = ["the best", ""] if target is None else [f"{target} %", f"{100 * reached - target:.1f}"]
            rows.append([f"≤ {limit:g}", aim[0], f"{reached:.1%}", aim[1], f"{paper:.1%}"])
    if rows:
        yield "tight, against its targets", table(
            ["certified bound", "target", "reached", "above it by", "the paper's architecture reaches"], rows)
    rows = [[f"{start} {settings(change)}".strip(), f"{r['val_acc']:.2%}", power(r["log10_certified"]), power(r["log10_attack"])]
            for (start, change, _), options in zip(ABLATIONS, ABLATION_RUNS)
            for r in records if r["options"] == complete("ablation", options)[1]]
    if rows:
        yield "tight, what each change does", table(["", "accuracy", "certified", "attack"], rows)


def speed_tables(runs):
    """speed.md's table, and the default's three seeds."""
    of = lambda what: [r for r in runs if r["what"] == what]
    yield "default", table(
        ["seed", "accuracy", "paper protocol", "log10 certified", "seconds"],
        [[r["seed"], f"{r['val_acc']:.2%}", f"{r['paper_protocol_acc']:.2%}", f"{r['log10_certified']:.2f}",
          f"{r['wall_seconds']:.0f}"] for r in of("default")])
    rows = []
    for what in ("default", "default that day", "default before", "tight", "tight-content"):
        if same := of(what):
            seconds = spread([r["wall_seconds"] for r in same], "{:.0f} s")
            rows.append([f"{what}, to the end", f"{seconds} for {mean(r['val_acc'] for r in same):.2%}", same[0]["command"]])
    rows += [[f"{r['name']}, training alone", f"{r['trace']['seconds'][-1]:.0f} s for {r['trace']['val_acc'][-1]:.2%}", r["command"]]
             for r in of("curve")]
    rows += [["step", f"{r['tokens_per_second']:,.0f} tokens/s, {r['step_over_floor']:.2f}, {r['optimizer_share']:.1%}, "
              f"{r['matmul_share']:.0%}", r["command"]] for r in of("step")]
    rows += [[f"{r['method']}, {r['shape']}", f"{r['times_svd']:g}, {r['error']}", r["command"]] for r in of("method")]
    for r in of("bounds"):
        rows += [[name, f"{r[key]:.3g} s", r["commands"][key]] for name, key in (
            ("certificate of the default model", "certificate_default"), ("of the 145 M model", "certificate_145M"),
            ("all bounds and norms of an evaluation, 145 M", "bounds_145M"),
            ("largest singular value, 3072 × 768, rounded up", "sigma_3072x768"),
            ("the same by svdvals", "svdvals_3072x768"), ("on one thread", "svdvals_3072x768_one_thread"))]
    yield "what it costs", table(["", "measured", "command"], [[*row[:2], f"`{row[2]}`"] for row in rows])


def readme_tables(records):
    """Those of README.md that are about other records, too."""
    soft = of_pair(searched(records, "grid"), "soft_cap", "muon")
    balls = {r["options"]["w_max"]: r for r in records if r["part"] == "ball"}
    if soft:
        yield "attack, in short", table(
            ["`w_max`", "accuracy", "attack", "certified", "with a ball", "paper"],
            [[f"{r['options']['w_max']:g}", f"{r['val_acc']:.2%}", power(r["log10_attack"]), power(r["log10_certified"]),
              power(ball["log10_certified_ball"]) if (ball := balls.get(r["options"]["w_max"])) else "?", power(r["log10_paper"])]
             for r in soft])


IMAGE_RADII = (36, 72, 108)  # in 255ths of a pixel's range


def cifar_tables(records):
    yield "CIFAR-10", table(
        ["preset", "steps", "accuracy", "training loss", *(f"certified at {eps}/255" for eps in IMAGE_RADII), "attack leaves",
         "bound"],
        [[settings(runs[0]["options"]), f"{runs[0]['trace']['step'][-1]:,}", spread([r["val_acc"] for r in runs], "{:.1%}"),
          f"{mean(r['trace']['train_loss'][-1] for r in runs):.3f}",
          *(f"{mean(r[f'certified_acc_{eps}'] for r in runs):.1%}" for eps in IMAGE_RADII),
          ", ".join(f"{100 * mean(r[f'attacked_acc_{eps}'] for r in runs):.1f}" for eps in IMAGE_RADII),
          power(max(r["log10_certified"] for r in runs))] for runs in seeds(records, "cifar")])
    if grid := [r for r in records if r["part"] == "cifar-grid" and "val_acc" in r]:
        yield "CIFAR-10, accuracy and bound", table(
            ["", "lr", *("strongest constraint", "", "", "weakest")],
            [[who({"method": m, "optimizer": o}), chosen_lr((m, o), records, "cifar-lr"), *map(image_cell, image_runs(grid, m, o))]
             for m, o in pairs()])
    if equal := seeds(records, "cifar-pairs"):
        yield "CIFAR-10, pairs of equal accuracy", table(
            ["", "options", "accuracy", "bound", *(f"attack leaves at {eps}/255" for eps in (*IMAGE_RADII, 255)),
             *(f"certified at {eps}/255" for eps in IMAGE_RADII[:2])],
            [[who(runs[0]["options"]), image_settings(runs[0]["options"]), spread([r["val_acc"] for r in runs], "{:.1%}"),
              power(max(r["log10_certified"] for r in runs)),
              *(f"{mean(r['attacked'][str(eps)] for r in runs):.1%}" for eps in (*IMAGE_RADII, 255)),
              *(f"{mean(r[f'certified_acc_{eps}'] for r in runs):.1%}" for eps in IMAGE_RADII[:2])] for runs in equal])


def image_settings(options):
    """What sets a run of the images' grid apart, but for method and optimizer."""
    return ", ".join(f"{name} {options[name]:g}" for name in ("w_max", "weight_decay", "lr") if name in options)


def image_runs(grid, method, optimizer):
    """The run of a pair at each strength, None where there is none."""
    return [of_strength(grid, method, optimizer, strength) for strength in image_strengths(method, optimizer)]


def image_cell(r):
    return f"{r['val_acc']:.1%} at {power(r['log10_certified'])}" if r else "diverged"


def books_tables(records):
    if long := seeds(records, "books"):
        yield "books", table(
            ["", "steps", "accuracy", "loss", "training loss", "certified", "attack", "median certified radius",
             *(f"certified at {r}" for r in RADII), "attack leaves", "largest activation", "float8 loses"],
            [[book_name(runs[0]), f"{runs[0]['options']['max_steps']:,}", spread([r["val_acc"] for r in runs]),
              spread([r["val_loss"] for r in runs], "{:.3f}"), f"{mean(r['trace']['train_loss'][-1] for r in runs):.3f}",
              *(power(max(r[bound] for r in runs)) for bound in ("log10_certified", "log10_attack")), median_radius(runs),
              *(f"{mean(at(r, radius) for r in runs):.1%}" for radius in RADII), left(runs),
              f"{max(r['act_max'] for r in runs):.1f}", float8(runs)]
             for runs in sorted(long, key=lambda runs: (book_name(runs[0]), runs[0]["options"]["max_steps"]))])
        yield "books, in short", table(
            ["model", "accuracy", "certified bound", "certified at 0.03", "attack leaves at 0.03"],
            [[book_name(runs[0]), spread([r["val_acc"] for r in runs], "{:.1%}"), power(max(r["log10_certified"] for r in runs)),
              f"{mean(at(r, 0.03) for r in runs):.1%}", f"{mean(r['radii']['0.03']['attack_first'] for r in runs):.1%}"]
             for runs in longest_books(records)])
    if tokens := [r for r in records if r["part"] in ("tokens", "nanogpt")]:
        full = lambda r: [power(r["log10_certified"]), power(r["log10_attack"]), median_radius([r]), float8([r])]
        yield "GPT-2 tokens, longer", table(
            ["", "accuracy", "loss", "training loss", "largest activation", "certified", "attack",
             "median certified radius", "float8 loses"],
            [[book_name(r), f"{r['val_acc']:.2%}", f"{r['val_loss']:.3f}",
              f"{r['trace']['train_loss'][-1]:.3f}", f"{r['act_max']:.1f}", *(full(r) if r["part"] == "tokens" else 4 * [""])]
             for r in tokens])
    steps = lambda values, form: ", ".join(f"{x:{form}}" for x in (values if len(values) < 6 else values[1::2]))
    for part, title, common in (("smoke", "GPT-2 tokens, narrow", NARROW), ("wikitext", "WikiText-2", WIKITEXT | FIRST)):
        runs = [r for r in records if r["part"] == part]
        yield title, table(
            ["", "training loss", "validation loss", "largest norm over w_max", "largest activation", "log10 certified"],
            [[settings({name: value for name, value in r["options"].items() if common.get(name) != value}) or "the first run",
              *(steps(r["trace"][name], ".2f") for name in ("train_loss", "val_loss")), f"{r['trace']['norm_over_cap'][-1]:.2f}",
              steps([max(layers) for layers in r["trace"]["act_max_layers"]], ",.0f"), f"{r['log10_certified']:.1f}"] for r in runs])


def all_tables(records):
    return [*tables(records), *tight_tables(read(TIGHT), records), *cifar_tables(read(CIFAR)),
            *books_tables(read(BOOKS)), *speed_tables(read(RESULTS / "speed.jsonl")), *readme_tables(records)]


FIGURES = (tradeoff, norms, headline, radius, tight, cifar, books, activations, speed)


def main():
    parser = Parser(description=__doc__.split("\n")[1])
    parser.add_argument("--tables", action="store_true", help="print the tables and draw nothing")
    args = parser.parse_args()
    with one_line_errors("plot.py"):
        records = read()
        if not records:
            raise UserError("results/shakespeare.jsonl has no runs; make them with python results/sweep.py")
        for title, text in all_tables(records) if args.tables else ():
            say(f"### {title}\n\n{text}")
        if not args.tables:
            try:
                import matplotlib.pyplot as plt
            except ImportError:
                raise UserError("the figures need matplotlib: pip install matplotlib")
            for draw in FIGURES:
                draw(records, plt).savefig(RESULTS / f"{draw.__name__}.png", dpi=150)


if __name__ == "__main__":
    main()
