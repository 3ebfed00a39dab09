"""XLA's flags in tests: fake devices, and compilations that cost little. jax reads them, so they are set before it."""


def devices(count: int) -> str:
    """So many fake CPU devices, and programs compiled as users' are."""
    return f"--xla_force_host_platform_device_count={count}"


def flags(count: int) -> str:
    """So many fake CPU devices, and programs that are compiled cheaply.

    Tests compile much and compute little: unoptimised machine code saves a third of a first run of the suite, and the
    older of XLA's two ways to write fused loops two fifths of the rest. With that alone, training on eight devices hung
    in most runs until XLA aborted, and in none of eight with operations in one order, which the last flag asks for.
    """
    return (
        f"{devices(count)} --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false "
        "--xla_cpu_enable_concurrency_optimized_scheduler=false"
    )
