"""What the GPU suite writes: JSON, tables, a picture."""

import json
import sys

import pytest

from support.gpu_cases import BOTH, speed_case, timed
from support.pictures import assert_drawn
from wmtp.benchmarks.gpu_cases import predicted_ms, products_flops
from wmtp.benchmarks.gpu_report import compared, markdown, plot, predicted_records, write
from wmtp.benchmarks.gpu_worker import new_record
from wmtp.benchmarks.problem import Case


def made_up():
    return compared(
        [
            timed(speed_case("fused", "forward"), 0.1, tier="online"),
            timed(speed_case("fused"), 0.25, 262_144_000, tier="row"),
            timed(speed_case("copy"), 0.2),
            timed(speed_case("eager"), 2.0, 3 * 262_144_000),
            timed(speed_case("liger"), 1.0),
            timed(speed_case("fused_inplace", "inplace"), 0.2, 262_144, tier="row"),
            new_record(speed_case("compiled"), "not run", "out of time"),
            new_record(speed_case("compiled", "forward"), "not run", "out of time"),
            new_record(speed_case("liger", "forward"), "refused", "no"),
            new_record(speed_case(shape=(1, 8192, 4, 256000), dtype="float32"), "does not fit"),
        ]
    )


def test_bandwidth_is_compared_with_the_copys():
    forward, both, copy, *_ = made_up()
    assert copy["gb_s"] == 2621.4  # 2 x 262.144 MB in 0.2 ms
    assert both["of_copy"] == 0.8
    assert forward["gb_s"] == 2621.4  # one read in half of the time
    assert forward["of_copy"] == 1.0
    assert both["peak"] == 1.0
    assert both["predicted_ms"] == pytest.approx(0.217893, rel=1e-5)
    assert made_up()[3]["predicted_ms"] is None


def page():
    steps = [{"name": "tests", "outcome": "failed", "why": "cut off", "seconds": 120.0}]
    environment = {"gpu": "NVIDIA H100", "driver": "580", "torch": "2.11", "cuda-bindings": None}
    results = {"command": "python -m benchmarks.gpu --out D", "environment": environment}
    return {**results, "absent": {"quack": "not here"}, "steps": steps, "cases": made_up()}


def test_markdown_by_hand():
    text = markdown(page())
    assert "gpu NVIDIA H100, driver 580, torch 2.11\n" in text
    assert "| tests | failed (120 s) | cut off |" in text
    assert "- absent: quack, not here" in text
    assert "| 32000 | bfloat16 | 100 % | 80 % | 100 % | 0.0010 | 8.0x |  | 4.0x |  |" in text
    row = (
        "| 1x1024x4x32000 | bfloat16 | fused | given | row | 0.2500 | 0.2250-0.2750 | 2097 | 80 % "
    )
    assert row + "| 1.000 | 0.2179 *predicted* |" in text
    without = text.split("## Without a time\n\n")[1].splitlines()
    assert len(without) == 3
    assert "liger-given" in without[0]
    assert without[0].endswith(": refused (no)")
    assert "fused-given" in without[1]
    assert without[1].endswith(": does not fit")
    assert without[2] == "- speed: 2 not run (out of time)"


def test_every_row_of_a_table_has_its_columns():
    table = []
    for line in [*markdown(page()).splitlines(), ""]:
        if line.startswith("| "):
            table.append(line.count(" | "))
        elif table:
            assert set(table) == {table[0]}
            table = []


def test_json_holds_everything(tmp_path):
    write(page(), tmp_path / "new", "gpu")
    assert json.loads((tmp_path / "new" / "gpu.json").read_text()) == json.loads(json.dumps(page()))


def test_predictions_have_no_measured_number():
    found = predicted_records([speed_case(), speed_case("eager"), speed_case("copy")])
    assert [record["provider"] for record in found] == ["fused", "copy"]
    assert [record["tier"] for record in found] == ["online", ""]


def test_picture(tmp_path):
    pytest.importorskip("matplotlib")
    assert plot(made_up(), tmp_path / "gpu.png") is None
    assert_drawn(tmp_path / "gpu.png")
    assert plot([], tmp_path / "none.png") == "no picture: no speed was timed"


def test_no_picture_without_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "wmtp.benchmarks.plot", raising=False)
    monkeypatch.delattr("wmtp.benchmarks.plot", raising=False)
    assert plot(made_up(), tmp_path / "gpu.png").startswith("no picture: ")
    assert not list(tmp_path.iterdir())


# --- linear --------------------------------------------------------------------------------------

FROZEN = "frozen"


def linear_case(provider="fused", direction=BOTH):
    shape = (1, 1024, 4, 128256)
    return Case("linear", shape, "bfloat16", direction, provider, "uniform", dim=4096)


def test_times_stand_beside_the_products():
    gradients = 2 * 4096 * (4096 + 128256)
    records = compared(
        [
            timed(linear_case(), 20.0, gradients + 3 * 2**20),
            timed(linear_case("three_products"), 16.0),
            timed(linear_case(direction=FROZEN), 15.0),
            timed(linear_case("two_products", FROZEN), 12.0),
            new_record(linear_case("liger"), "refused", "no"),
        ]
    )
    ours, three, frozen, two, refused = records
    assert (ours["of_products"], three["of_products"], frozen["of_products"]) == (0.8, 1.0, 0.8)
    assert ours["mib"] == 3.0
    assert ours["tflops"] == round(products_flops(linear_case()) / 20e-3 / 1e12, 1)
    assert two["predicted_ms"] == predicted_ms(linear_case("two_products", FROZEN))
    assert refused["predicted_ms"] is None
    page = {"command": "c", "environment": {}, "absent": {}, "steps": [], "cases": records}
    text = markdown(page)
    row = "| 1x1024x4x128256 x 4096 | bfloat16 | fused | uniform | 20.000 | 18.000-22.000 | "
    predicted = f"{predicted_ms(linear_case()):.3f} *predicted*"
    assert row + f"{ours['tflops']:.0f} | 80 % | 3.0 | {predicted} |" in text
    assert "refused (no)" in text.split("## Without a time")[1]


def test_both_kinds_of_records_go_on_one_page():
    cases = [Case("speed", (1, 8, 2, 50), "bfloat16", BOTH, "fused"), linear_case()]
    records = predicted_records(cases)
    assert [record["tier"] for record in records][1] == ""
    again = compared([{**record, "why": ""} for record in records])
    assert [record["predicted_ms"] for record in again] == [
        record["predicted_ms"] for record in records
    ]
    text = markdown({"command": "c", "environment": {}, "absent": {}, "steps": [], "cases": again})
    assert "## linear, forward+backward" in text
    assert "## speed, forward+backward" in text
