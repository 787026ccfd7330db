"""Keeps the tests of one loss together, which share their compiled programs."""


def pytest_collection_modifyitems(items):
    def loss(item):
        params = getattr(getattr(item, "callspec", None), "params", {})
        return getattr(params.get("case"), "name", "")

    # In place of the order by test function. `pytest -n 2 --dist worksteal` then
    # gives each process one half of the losses, and none is compiled in both.
    battery = [item for item in items if "test_battery" in item.nodeid]
    ordered = iter(sorted(battery, key=loss))
    items[:] = [
        next(ordered) if "test_battery" in item.nodeid else item for item in items
    ]
