from fuzz import target


def test_the_fuzz_target_holds_on_random_bytes():
    for seed in range(1500):
        target(seed.to_bytes(8, "little"))
