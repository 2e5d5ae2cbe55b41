"""Descriptions of cards."""

from moepp_megatron.config.hardware import find_hardware, known_hardware, load_hardware
from tests.refusals import config_error


def test_every_description_is_valid_and_bears_the_name_of_its_file():
    names = known_hardware()
    assert {"h100_sxm", "h200", "a100_sxm", "b200", "cpu"} <= set(names)
    assert [load_hardware(name).name for name in names] == names


def test_a_gpu_has_every_rated_number():
    for name in known_hardware():
        hardware = load_hardware(name)
        if hardware.kind == "gpu":
            may_lack = {"fp8_tflops", "price_per_hour"}
            lacks = {key for key, value in hardware.model_dump().items() if value is None}
            assert lacks <= may_lack, name
            assert hardware.device_names, name


def test_cards_are_found_by_their_nvml_name():
    found = find_hardware("NVIDIA H100 80GB HBM3")
    assert found.name == "h100_sxm"
    # Other cards of the same chip have other numbers.
    assert find_hardware("NVIDIA H100 PCIe") is None
    assert find_hardware("NVIDIA H200 NVL") is None


def test_peak_of_a_number_format():
    h100, a100 = load_hardware("h100_sxm"), load_hardware("a100_sxm")
    assert h100.peak_tflops("bf16") == h100.bf16_tflops
    assert h100.peak_tflops("bf16", "hybrid") == h100.fp8_tflops
    assert h100.peak_tflops("fp32") == h100.fp32_tflops
    assert a100.peak_tflops("bf16", "hybrid") is None


def test_a_file_of_ones_own(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\nbf16_tflops: 100\nthresholds:\n  matmul_fraction: 0.5\n")
    mine = load_hardware(str(path))
    assert (mine.bf16_tflops, mine.thresholds.matmul_fraction) == (100, 0.5)
    path.write_text("name: mine\nbf16_tflop: 100\n")
    with config_error("bf16_tflop: Extra inputs"):
        load_hardware(str(path))


def test_unknown_names_are_refused_with_the_known_ones():
    with config_error(r"hardware \(h1000\) must be a known name .*h100_sxm"):
        load_hardware("h1000")
