"""Tables, sentences and pictures of the paper's experiments, from runs with known numbers."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

for needed in ("matplotlib", "psutil", "rich", "scipy"):
    pytest.importorskip(needed)

from matplotlib.colors import to_hex  # noqa: E402
from rich.console import Console  # noqa: E402

from bench.paper import compare, pictures, report, reported  # noqa: E402
from bench.paper.runs import BrokenRun, groups, read  # noqa: E402

ROOT = Path(__file__).parents[1]
MACHINE = dict(gpu="", cpu="a CPU", threads=2, versions={"torch": "2.12"}, date="2026-10-01T12:00:00", commit="c", command="d")
PROTOCOL = dict(epochs=3, drop=2, factor=0.1, batch_size=128, train_images=60_000, test_images=10_000, steps_per_epoch=469,
                augmentation="pad 4, crop, flip", precision="float32", width=1.0)  # fmt: skip

OPTIONS = dict(lr=1e-3, sgd_lr=0.1, batch_size=128)


def run_of(optimizer, seed, errors, losses=(0.5, 0.4, 0.45), **others):
    epochs = [dict(epoch=k + 1, test_error=e, test_loss=loss) for k, (e, loss) in enumerate(zip(errors, losses, strict=False))]
    about = dict(data="Fashion-MNIST", data_key="fashion", network="small", title="small network", parameters=1234)
    run = about | dict(optimizer=optimizer, seed=seed, options=OPTIONS, machine=MACHINE, epochs=epochs)
    return run | others | dict(protocol=PROTOCOL | others.get("protocol", {}))


def save(folder, *runs):
    (folder / "runs").mkdir(exist_ok=True)
    for run in runs:
        (folder / "runs" / f"{re.sub('[^a-z0-9]', '-', run['optimizer'].lower())}-seed{run['seed']}.json").write_text(
            json.dumps(run)
        )
    return folder


def minima(optimizer, *least, **others):
    """A run per seed whose smallest error is the given one, in its second epoch."""
    return [run_of(optimizer, seed, (least + 20, least, least + 1), **others) for seed, least in enumerate(least)]


def flat_losses(optimizer, *least):
    return [run_of(optimizer, seed, (9, 9, 9), (least + 1, least, least)) for seed, least in enumerate(least)]


def group_of(folder, *runs):
    (group,) = groups(read(save(folder, *runs)))
    return group


def row_of(table, optimizer):
    """The cells of an optimizer's row in Markdown."""
    (line,) = [line for line in table.splitlines() if line.startswith(f"| {optimizer} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


# --- The paper's numbers ----------------------------------------------------------------------------------------------


def test_table_1_is_the_papers():
    """Sums of each column, added up from the paper's text, and what the paper says of its bold numbers."""
    sums = {("cifar10", "resnet34"): (51.07, 2.044), ("cifar10", "densenet121"): (50.4, 2.02),
            ("cifar100", "resnet34"): (225.03, 9.315), ("cifar100", "densenet121"): (216.63, 9.393)}  # fmt: skip
    for key, expected in sums.items():
        rows = {name: reported.TABLE_1[(*key, name)] for name in reported.ORDER}
        assert tuple(map(sum, zip(*rows.values(), strict=True))) == pytest.approx(expected)
        for measure in (0, 1):
            adaptive = min((name for name in rows if name != "SGD"), key=lambda name: rows[name][measure])
            assert adaptive.startswith("AdaBayes")
    assert len(reported.TABLE_1) == 36


# --- The table --------------------------------------------------------------------------------------------------------


def test_a_row_is_the_mean_of_minima(tmp_path):
    """Error and loss have their minima in different epochs, and not in the last."""
    folder = save(
        tmp_path,
        run_of("AdaBayes", 0, (6, 4.0, 5.0), (0.30, 0.40, 0.50)),
        run_of("AdaBayes", 1, (6, 4.2, 5.0), (0.31, 0.40, 0.60)),
        run_of("AdaBayes", 2, (4.4, 6, 5.6), (0.40, 0.35, 0.70)),
    )
    report.write(folder)
    with (folder / "table.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    expected = dict(error=4.2, error_sd=0.2, error_last=5.2, loss=0.32, loss_sd=0.0264575, loss_last=0.6)
    for key, value in (expected | dict(error_binomial=0.2005891, seeds=3)).items():  # sqrt(0.042 * 0.958 / 10,000)
        assert float(row[key]) == pytest.approx(value, rel=1e-5), key
    cells = row_of((folder / "table.md").read_text(), "AdaBayes")
    shown = ["**4.20**", "0.20", "0.20", "**5.20**", "**0.3200**", "0.0265", "**0.6000**", "**4.84**", "0.229"]
    assert cells == ["AdaBayes", "3", *shown[:-1], "**0.229**"]


def test_the_order_of_rows_and_the_best_in_bold(tmp_path):
    ours = {"AdaBayes-FP, slow path": 5, "AdaBayes": 6.001, "SGD": 7.5, "Adam": 6.004, "AdaBayes, slow path": 9}
    group = group_of(tmp_path, *(run for name, least in ours.items() for run in minima(name, least)))
    table = report.markdown(group)
    names = re.findall(r"^\| (\w[^|]*) \|", table, re.MULTILINE)
    assert names == ["optimizer", "SGD", "Adam", "AdaBayes", "AdaBayes, slow path", "AdaBayes-FP, slow path"]
    assert [row_of(table, name)[2] for name in names[1:]] == ["7.50", "6.00", "6.00", "9.00", "**5.00**"]
    assert row_of(table, "AdaBayes, slow path")[-2:] == ["-", "-"]  # the paper has no such row
    assert (row_of(table, "AdaBayes")[-2], row_of(table, "SGD")[-1]) == ("**4.84**", "**0.174**")


def test_what_looks_alike_is_bold_alike(tmp_path):
    table = report.markdown(group_of(tmp_path, *minima("AdaBayes", 6.001), *minima("Adam", 6.004)))
    assert row_of(table, "AdaBayes")[2] == row_of(table, "Adam")[2] == "**6.00**"


@pytest.mark.parametrize(
    ("key", "data", "network", "title", "heading", "number", "same"),
    [("fashion", "Fashion-MNIST", "small", "small network", "CIFAR-10, ResNet-34", "4.84", False),
     ("cifar10", "CIFAR-10", "resnet34", "ResNet-34", "CIFAR-10, ResNet-34", "4.84", True),
     ("cifar10", "CIFAR-10, JPEG q75", "densenet121", "DenseNet-121", "CIFAR-10, DenseNet-121", "4.56", False),
     ("cifar100", "TinyImageNet-100@32", "resnet18", "ResNet-18", "CIFAR-100, ResNet-34", "22.92", False)],
)  # fmt: skip
def test_the_papers_numbers_are_headed_by_what_they_are_of(tmp_path, key, data, network, title, heading, number, same):
    runs = minima("AdaBayes", 5, data_key=key, data=data, network=network, title=title)
    table = report.markdown(group_of(tmp_path, *runs))
    assert f"paper's error, % {heading} |" in table
    assert row_of(table, "AdaBayes")[-2] == f"**{number}**"
    assert (f"The paper's numbers are of {heading}: only the order" in table) == (not same)


def test_the_protocol_says_what_was_scaled_down(tmp_path):
    line = report.protocol(group_of(tmp_path, *minima("AdaBayes", 5, protocol=dict(batch_size=64))))
    for part in ("Protocol: 3 epochs, learning rates times 0.1 after epoch 2, batches of 64, 60,000 training and 10,000 test",
                 "epochs 3 (200)", "drop after epoch 2 (150)", "batch size 64 (128)", "training images 60,000 (50,000)",
                 "data Fashion-MNIST (CIFAR-10)", "network small network (ResNet-34)"):  # fmt: skip
        assert part in line
    assert "float32 (" not in line


def test_the_papers_own_protocol_is_said_to_be_it(tmp_path):
    theirs = dict(protocol=dict(epochs=2, drop=150, train_images=50_000, width=0.5))
    runs = minima("AdaBayes", 5, data_key="cifar10", data="CIFAR-10", network="resnet34", title="ResNet-34", **theirs)
    group = group_of(tmp_path, *runs)
    assert report.protocol(group).endswith("ResNet-34 of width 0.5, 1,234 parameters. Scaled down or changed, in brackets the "
                                           "paper's: epochs 2 (200), width 0.5 (1.0).")  # fmt: skip
    group.protocol.update(epochs=200, width=1.0)
    assert report.protocol(group).endswith("As in the paper.")


# --- Runs that are not complete, missing, broken ----------------------------------------------------------------------


def test_incomplete_and_missing_runs_are_listed_and_not_averaged(tmp_path):
    cut = run_of("AdaBayes", 2, (1.0, 1.0))
    folder = save(tmp_path, *minima("AdaBayes", 5, 6), cut, *minima("SGD", 7, 8, 9), minima("Adam", 7, 8, 9)[1])
    report.write(folder)
    table = (folder / "table.md").read_text()
    assert row_of(table, "AdaBayes")[1:3] == ["2", "**5.50**"]
    assert "- AdaBayes, seed 2: not complete, 2 of 3 epochs.\n- Adam, seed 0: no run.\n- Adam, seed 2: no run.\n" in table
    assert table.count("no run.") == 2
    assert "- No run: AdaGrad, AMSGrad, AdaBound, AMSBound, AdamW, AdaBayes-FP." in table


def test_a_folder_of_incomplete_runs_alone(tmp_path):
    folder = save(tmp_path, run_of("AdaBayes", 0, (5, 4)))
    report.write(folder)
    assert "AdaBayes, seed 0: not complete" in (folder / "table.md").read_text()
    pictures.draw(folder)
    report.show(folder, Console(file=None, quiet=True))


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is broken"), ("[]", "lacks data"), ("{}", "lacks data"), (b"\xff\xfe", "is broken"),
     (json.dumps(run_of("Adam", 0, (1, 2, 3)) | {"protocol": {}}), "lacks augmentation, batch_size"),
     (json.dumps(run_of("Adam", 0, (1, 2, 3)) | {"epochs": [{"epoch": 1}]}), "lacks test_error, test_loss"),
     (json.dumps(run_of("Adam", 0, (1, 2, 3)) | {"epochs": run_of("Adam", 0, (1, 2, 3))["epochs"][1:]}), "not 1, 2, 3")],
)  # fmt: skip
def test_a_broken_file_is_named(tmp_path, text, message):
    path = save(tmp_path, *minima("AdaBayes", 5)) / "runs/adam-seed0.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=rf"adam-seed0\.json .*{message}"):
        read(tmp_path)


def test_an_empty_folder_is_an_error(tmp_path):
    with pytest.raises(BrokenRun, match="no runs in"):
        report.write(tmp_path)


def test_seeds_with_other_options_are_refused(tmp_path):
    runs = minima("AdaBayes", 5, 6)
    runs[1]["options"] = {"lr": 0.2}
    with pytest.raises(ValueError, match=r"adabayes-seed1\.json and .*adabayes-seed0\.json have different options"):
        report.write(save(tmp_path, *runs))


def test_other_protocols_are_not_averaged(tmp_path):
    runs = minima("AdaBayes", 5, 6)
    runs[1]["protocol"]["batch_size"] = 64
    found = groups(read(save(tmp_path, *runs)))
    assert [compare.rows(group)[0]["error"] for group in found] == [5, 6]


# --- Standard errors --------------------------------------------------------------------------------------------------


def test_a_difference_has_pooled_seeds_and_binomial_errors(tmp_path):
    """Variances 0.04 and 0.12, pooled 0.08 (4 degrees of freedom); Adam, of one seed, has that too, and does not change it.

    AdaBayes and SGD: 0.08 (1/3 + 1/3) + 0.042 * 0.958 + 0.052 * 0.948 = 0.0533333 + 0.040236 + 0.049296 = 0.377975^2.
    AdaBayes and Adam: 0.08 (1/3 + 1) + 0.040236 + 0.05 * 0.95 = 0.106667 + 0.087736 = 0.440911^2.
    """
    group = group_of(tmp_path, *minima("AdaBayes", 4.0, 4.2, 4.4), *minima("SGD", 5.0, 5.0, 5.6), *minima("Adam", 5.0))
    found = compare.comparison(group, compare.ERROR)
    assert found.pooled == pytest.approx(0.08)
    sgd, adam = found.difference("AdaBayes", "SGD"), found.difference("AdaBayes", "Adam")
    assert (sgd.value, sgd.error, sgd.level) == (pytest.approx(1.0), pytest.approx(0.377975, rel=1e-5), 2)
    assert (adam.value, adam.error, adam.level) == (pytest.approx(0.8), pytest.approx(0.440911, rel=1e-5), 1)
    alone = found.alone().difference("AdaBayes", "SGD")
    assert alone.error == pytest.approx(0.230940, rel=1e-5)
    lines = report.sentences(group, compare.ERROR)
    assert lines[0] == ("Seeds and test images: higher than AdaBayes by one to two standard errors: Adam (+0.80 ± 0.44); "
                        "higher than AdaBayes by more than two standard errors: SGD (+1.00 ± 0.38).")  # fmt: skip
    assert lines[1].startswith(
        "Seeds alone: higher than AdaBayes by more than two standard errors: Adam (+0.80 ± 0.33), SGD (+1.00 ± 0.23)"
    )


def test_a_loss_has_seeds_alone(tmp_path):
    """Variances 0.0001 each; 0.0001 (1/3 + 1/3) = 0.0081650^2."""
    group = group_of(tmp_path, *flat_losses("AdaBayes", 0.21, 0.22, 0.23), *flat_losses("SGD", 0.19, 0.20, 0.21))
    difference = compare.comparison(group, compare.LOSS).difference("AdaBayes", "SGD")
    assert (difference.value, difference.error) == (pytest.approx(-0.02), pytest.approx(0.0081650, rel=1e-4))
    first, *others = report.sentences(group, compare.LOSS)
    assert first == "Seeds alone: lower than AdaBayes by more than two standard errors: SGD (-0.0200 ± 0.0082)."
    assert not any(line.startswith("Seeds alone") for line in others)


def test_one_seed_has_the_binomial_error_alone(tmp_path):
    """sqrt(0.05 * 0.95 + 0.06 * 0.94) = 0.32234 in percent points, over 10,000 images."""
    folder = save(tmp_path, *minima("AdaBayes", 5), *minima("SGD", 6))
    report.write(folder)
    table = (folder / "table.md").read_text()
    assert row_of(table, "SGD")[1:5] == ["1", "6.00", "-", "0.24"]
    assert "- Test images alone: higher than AdaBayes by more than two standard errors: SGD (+1.00 ± 0.32)." in table
    assert "With one seed each there is no standard error: no difference can be told from chance." in table
    assert "the spread between seeds is unknown" in table
    assert "Seeds" not in table.replace("Seeds alone is", "")


def test_fewer_test_images_have_a_larger_error(tmp_path):
    group = group_of(tmp_path, *minima("AdaBayes", 5, protocol=dict(test_images=400)))
    assert compare.rows(group)[0]["error_binomial"] == pytest.approx(100 * (0.05 * 0.95 / 400) ** 0.5)


@pytest.mark.parametrize(("value", "level"), [(0.5, 0), (-0.5, 0), (1.0, 0), (1.1, 1), (-1.9, 1), (2.0, 1), (2.1, 2), (-2.1, 2)])
def test_levels_are_strict(value, level):
    assert compare.Difference("a", "b", value, 1.0).level == level


def test_a_tie_is_within_any_error(tmp_path):
    """No errors at all: the standard error is 0, and so is the difference."""
    group = group_of(tmp_path, *minima("AdaBayes", 0, 0), *minima("SGD", 0, 0))
    difference = compare.comparison(group, compare.ERROR).difference("AdaBayes", "SGD")
    assert (difference.value, difference.error, difference.level) == (0, 0, 0)
    assert report.sentences(group, compare.ERROR)[0].startswith(
        "Seeds and test images: within one standard error of AdaBayes: SGD"
    )


def test_a_loss_that_is_not_finite_is_left_out(tmp_path):
    nan = float("nan")
    runs = (
        flat_losses("AdaBayes", 0.21, 0.22)
        + flat_losses("Adam", 0.31, 0.32)
        + [run_of("SGD", k, (90, 90, 90), (nan,) * 3) for k in (0, 1)]
    )
    once = run_of("AdamW", 0, (9, 9, 9), (nan, 0.3, nan))
    group = group_of(tmp_path, *runs, once)
    found = compare.comparison(group, compare.LOSS)
    assert found.pooled == pytest.approx(0.00005)
    assert found.samples["AdamW"].mean == 0.3
    lines = report.sentences(group, compare.LOSS)
    assert lines[0] == "Not finite, and left out: SGD."
    assert not any("SGD" in line for line in lines[1:])
    assert row_of(report.markdown(group), "SGD")[6] == "nan"
    assert row_of(report.markdown(group), "AdaBayes")[6] == "**0.2150**"


# --- Orders -----------------------------------------------------------------------------------------------------------


def test_our_order_beside_the_papers(tmp_path):
    """The paper (CIFAR-10, ResNet) has AdaBayes 4.84, SGD 5.17, AdaGrad 6.84, Adam 7.11.

    With one seed each the standard errors are 0.425 (SGD, AdaBayes) and 0.465 (Adam, AdaGrad): the first pair is within one, the
    last beyond one, the other four beyond two, and as in the paper. Tau: 4 pairs agree, 2 do not: (4 - 2) / 6; of the 24 orders
    18 are as far from 0.
    """
    ours = {"SGD": 10, "Adam": 12, "AdaGrad": 12.7, "AdaBayes": 10.1}
    group = group_of(tmp_path, *(run for name, least in ours.items() for run in minima(name, least)))
    lines = report.sentences(group, compare.ERROR)
    assert lines[1] == (
        "In order: SGD 10.00, AdaBayes 10.10, Adam 12.00, AdaGrad 12.70. Neighbours more than two standard errors apart: "
        "AdaBayes and Adam; one to two: Adam and AdaGrad; within one: 1 of 3."
    )
    assert lines[2] == "The paper's order (CIFAR-10, ResNet-34): Kendall's tau 0.33 (p = 0.75)."
    assert lines[3] == (
        "Test images alone: of 6 pairs 4 stand as in the paper (4 of them by more than two standard errors), 1 the other way "
        "round (0), 1 are within one standard error, not distinguishable here."
    )
    assert lines[4:] == [
        "The other way round by one to two standard errors: Adam below AdaGrad (-0.70 ± 0.47; the paper +0.27, itself within one "
        "binomial standard error)."
    ]


def test_a_pair_far_the_other_way_round(tmp_path):
    ours = {"SGD": 10, "Adam": 5, "AdaBayes": 5}
    group = group_of(tmp_path, *(run for name, least in ours.items() for run in minima(name, least)))
    lines = report.sentences(group, compare.ERROR)
    assert (
        "of 3 pairs 1 stand as in the paper (1 of them by more than two standard errors), 1 the other way round (1), 1 are"
        in lines[3]
    )
    assert lines[4].startswith(
        "The other way round by more than two standard errors: Adam below SGD (-5.00 ± 0.37; the paper +1.94)."
    )


def test_a_tie_in_the_paper_is_neither(tmp_path):
    """Adam and AMSGrad both have 0.239 in the paper, AdaGrad 0.307."""
    runs = flat_losses("Adam", 0.1, 0.101) + flat_losses("AMSGrad", 0.2, 0.201) + flat_losses("AdaGrad", 0.3, 0.301)
    lines = report.sentences(group_of(tmp_path, *runs), compare.LOSS)
    assert (
        "of 3 pairs 2 stand as in the paper (2 of them by more than two standard errors), 0 the other way round (0)" in lines[2]
    )
    assert lines[2].endswith("not distinguishable here, 1 are tied in the paper.")


def test_variants_stand_against_their_originals(tmp_path):
    """Beside the original, not AdaBayes. Variances 0, 0.02, 0.08; 0.033333 (1/2 + 1/2) = 0.18257^2, and with 0.05 * 0.95 and
    0.06 * 0.94 it is 0.37045^2."""
    runs = minima("AdaBayes", 8, 8) + minima("AdaBayes-FP", 4.9, 5.1) + minima("AdaBayes-FP, slow path", 5.8, 6.2)
    group = group_of(tmp_path, *runs, *minima("Other, variant", 3))
    found = compare.comparison(group, compare.ERROR)
    assert found.pooled == pytest.approx((0.02 + 0.08) / 3)
    variants = [line for line in report.sentences(group, compare.ERROR) if "against" in line]
    assert variants == [
        "AdaBayes-FP, slow path, against AdaBayes-FP: +1.00 ± 0.37, by more than two standard errors (seeds and test images); "
        "± 0.18, by more than two standard errors (seeds alone)."
    ]


def with_ratios(run, *ratios):
    for epoch, ratio in zip(run["epochs"], ratios, strict=True):
        epoch["ratio"] = ratio
    return run


@pytest.mark.parametrize(("second", "verdict"), [(1.02, "1.0400 (1.0600, 1.0200 by seed), within 5 %"), (1.05, "not within 5 %")])
def test_figure_3_is_judged_before_the_drop(second, verdict, tmp_path):
    """The ratios of epoch 2 of 3; the filter remembers sigma^2 / eta^2 = 0.1 / (128 x 1e-6) steps; 2 x 469 had passed."""
    runs = [with_ratios(run, 2.0, ratio, 9.0) for run, ratio in zip(minima("AdaBayes", 5, 6), (1.06, second), strict=True)]
    (line,) = report.figure3(group_of(tmp_path, *runs))
    assert verdict in line
    assert "memory is 781 steps" in line
    assert "and 938 had passed" in line
    assert line in report.markdown(group_of(tmp_path, *runs))


def test_figure_3_without_points(tmp_path):
    """Of a network that has diverged no weight has a finite one."""
    (run,) = minima("AdaBayes", 5)
    points = dict(
        epoch=2, eta=1e-3, sigma_sq=1e-3, x=[], post=[], weights=0, left_out=9, ratio_mean=0, ratio_std=0, adam_side=None
    )
    folder = save(tmp_path, run)
    (folder / "runs" / "adabayes-seed0.figure3.json").write_text(json.dumps(points))
    assert [path.name for path in pictures.draw(folder)] == ["figure4.png", "figure3.png"]


def test_what_a_killed_run_was_writing_is_no_run(tmp_path):
    folder = save(tmp_path, *minima("AdaBayes", 5))
    (folder / "runs" / ".adabayes-seed0.json").write_text('{"data": "Fas')
    (folder / "runs" / ".adabayes-seed0.figure3.json").write_text("{")
    assert len(read(folder)) == 1
    report.write(folder)


def test_it_is_shown(tmp_path, capsys):
    folder = save(tmp_path, *minima("AdaBayes", 5, 6), *minima("SGD", 6, 7))
    report.show(folder, Console(width=140))
    shown = capsys.readouterr().out
    for part in ("Fashion-MNIST, small network", "│AdaBayes │    2│    5.50│0.71│ 0.23│", "CIFAR-10,", "Minimal test loss"):
        assert part in shown
    report.show(save(folder, *minima("AdaBayes-FP, decay kept at the drop", 5)), Console(width=80))
    table, narrow = capsys.readouterr().out.split("Protocol")[0], "│AdaBayes                 │    2│   5.50│0.71│"
    assert narrow.replace(" ", "") in table.replace(" ", "")
    assert "…" not in table


# --- Pictures ---------------------------------------------------------------------------------------------------------


def drawn(at):
    return {line.get_label(): line for line in at.get_lines()}


def test_figure_4_draws_means_and_ranges(tmp_path):
    runs = [
        run_of("SGD", 0, (9, 5, 4), (3, 2, 1)),
        run_of("SGD", 1, (11, 6, 4), (5, 2, 2)),
        run_of("SGD", 3, (13, 10, 4), (7, 2, 3)),
    ]
    group = group_of(
        tmp_path,
        *runs,
        run_of("Adam", 0, (7, 7, 7)),
        run_of("SGD", 2, (99, 99)),
        run_of("AdamW", 0, (8,)),
        run_of("AdamW", 1, (8, 3)),
    )
    figure = pictures.figure4([group])
    error, loss = figure.axes
    lines = drawn(error)
    assert lines["SGD"].get_xydata().tolist() == [[1, 11], [2, 7], [3, 4]]  # without the seed that is not complete
    assert drawn(loss)["SGD"].get_ydata().tolist() == [5, 2, 2]
    assert lines["AdamW (unfinished)"].get_ydata().tolist() == [8, 3]
    (band,) = error.collections
    corners = {tuple(corner) for path in band.get_paths() for corner in path.vertices}
    assert {(1, 9), (1, 13), (2, 5), (2, 10), (3, 4)} == corners
    assert [set(line.get_xdata()) for line in error.get_lines() if len(set(line.get_xdata())) == 1] == [{2}]  # the drop
    assert "a CPU, 2 threads; torch 2.12" in figure.get_supxlabel()


def test_figure_4_has_a_pair_for_variants(tmp_path):
    runs = minima("AdaBayes", 5) + minima("AdaBayes, slow path", 6) + minima("SGD", 7)
    error, _, variants, losses = pictures.figure4([group_of(tmp_path, *runs)]).axes
    shown = [{label for label in drawn(at) if not label.startswith("_")} for at in (error, variants, losses)]
    assert shown == [{"AdaBayes", "SGD"}, {"AdaBayes", "AdaBayes, slow path"}, {"AdaBayes", "AdaBayes, slow path"}]
    assert drawn(variants)["AdaBayes, slow path"].get_ydata().tolist() == [26, 6, 7]


def test_optimizers_differ_in_grey():
    """By dashes and width, whatever the colour: Table 1's nine, and the variants beside AdaBayes and AdaBayes-FP."""
    looks = {name: (style["linestyle"], style.get("linewidth", 1.5)) for name, style in pictures.STYLES.items()}
    assert list(looks)[:9] == list(reported.ORDER)
    assert len(set(list(looks.values())[:9])) == 9
    assert len(set(list(looks.values())[7:])) == len(looks) - 7 == 10


X, SIGMA_SQ = np.array([1e-5, 1e-3, 1e-1]), 1e-3
FIXED = np.array(
    [9.950124e-06, 6.180340e-04, 9.999000e-04]
)  # 1 / post = (1 + sqrt(1 + 4 (sigma^2 / x)^2)) / (2 sigma^2), by hand


def with_points(folder, group_runs, **others):
    points = dict(epoch=2, eta=1e-3, sigma_sq=SIGMA_SQ, x=X.tolist(), post=(1.5 * FIXED).tolist(), weights=1200, left_out=34,
                  ratio_mean=1.5, ratio_std=0.25, adam_side=dict(weights=56, ratio_mean=1.4, ratio_std=0.1))  # fmt: skip
    save(folder, *group_runs)
    (folder / "runs/adabayes-seed0.figure3.json").write_text(json.dumps(points | others))
    return groups(read(folder))


def ratios(optimizer, seed, *values):
    run = run_of(optimizer, seed, (9, 9, 9))
    for epoch, value in zip(run["epochs"], values, strict=True):
        epoch["ratio"] = value
    return run


def test_figure_3_draws_points_and_limits(tmp_path):
    runs = [
        ratios("AdaBayes", 0, 1, 1, 1.2),
        ratios("AdaBayes", 1, 1, 1.2, 1.4),
        ratios("AdaBayes, lagging variance", 0, 1, 1, 8),
    ]
    top, middle, bottom = pictures.figure3(with_points(tmp_path, runs)).axes
    assert np.allclose(top.collections[0].get_offsets(), np.stack([X, 1.5 * FIXED], 1), rtol=1e-6)
    assert np.allclose(middle.collections[0].get_offsets(), np.stack([X, np.full(3, 1.5)], 1), rtol=1e-6)
    lines = drawn(top)
    fixed = lines["Eq. 20"]
    assert np.allclose(np.interp(np.log(X[:2]), np.log(fixed.get_xdata()), fixed.get_ydata()), FIXED[:2], rtol=2e-3)
    adam = lines[r"Adam limit, $\eta\,/\sqrt{\langle g^2\rangle}$"]
    assert np.array_equal(adam.get_xdata(), adam.get_ydata())
    assert set(lines[r"SGD limit, $\sigma^2$"].get_ydata()) == {SIGMA_SQ}
    assert set(lines[r"$\sigma^2$"].get_xdata()) == {SIGMA_SQ}
    assert middle.get_title() == "1.500 ± 0.250 over 1,200 weights; 1.400 ± 0.100 over 56 on Adam's side"
    assert "34 weights never had a gradient" in [text.get_text() for text in top.texts]
    assert drawn(bottom)["AdaBayes"].get_ydata().tolist() == pytest.approx([1, 1.1, 1.3])
    assert drawn(bottom)["AdaBayes, lagging variance"].get_ydata().tolist() == [1, 1, 8]
    assert to_hex(fixed.get_color()) == "#009e73"


def test_fixed_point_is_eq_20():
    assert np.allclose(reported.eq_20(X, SIGMA_SQ), FIXED, rtol=1e-6)


def test_points_far_to_the_right_are_counted(tmp_path):
    x = np.concatenate([np.full(999, 1e-3), [1e9]])
    groups = with_points(
        tmp_path, [ratios("AdaBayes", 0, 1, 1, 1)], x=x.tolist(), post=np.full(1000, 1e-3).tolist(), adam_side=None
    )
    top, middle, _ = pictures.figure3(groups).axes
    assert "; 1 points lie further right" in top.texts[0].get_text()
    assert top.get_xlim()[1] < 1
    assert middle.get_title().endswith("none on Adam's side")


def test_figure_3_needs_adabayes_alone(tmp_path):
    assert pictures.figure3([group_of(tmp_path, *minima("SGD", 5))]) is None
    figure = pictures.figure3(groups(read(save(tmp_path, run_of("AdaBayes", 0, (9,))))))  # neither points nor ratios
    assert "no points" in figure.axes[0].texts[0].get_text()


def test_pictures_and_tables_need_no_optimizer(tmp_path):
    """From the JSON alone: with neither the package nor what trains."""
    with_points(tmp_path, [ratios("AdaBayes", 0, 1, 1, 1), *minima("SGD", 5)])
    missing = (
        "adabayes_fused",
        "sklearn",
        "bench.paper.optimizers",
        "bench.paper.train",
        "bench.paper.data",
        "bench.paper.networks",
    )
    code = f"""
import pathlib, sys
sys.modules.update(dict.fromkeys({missing}))
from bench.paper import pictures, report
folder = pathlib.Path({str(tmp_path)!r})
print(*(path.name for path in report.write(folder) + pictures.draw(folder)))
assert "matplotlib.pyplot" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["table.md", "table.csv", "figure4.png", "figure3.png"], done.stderr
    for name in ("figure4.png", "figure3.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
