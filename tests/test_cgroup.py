"""The limits of control groups, read from a tree that is made up."""

import pytest

from cybn import _cgroup

V1 = "31 23 0:28 / {mount} rw,relatime - cgroup cgroup rw,{controllers}"
V2 = "31 23 0:28 {root} {mount} rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate"


class Tree:
    def __init__(self, folder):
        self.folder = folder
        self.mount = folder / "mount point"  # a space: \040 in mountinfo
        self.mount.mkdir()
        self.groups, self.mounts = [], ["23 27 0:22 / /sys rw,relatime - sysfs sysfs rw"]

    def escaped(self):
        return str(self.mount).replace(" ", "\\040")

    def write(self, limits, file):
        for name, limit in limits.items():
            (self.mount / name).mkdir(parents=True, exist_ok=True)
            (self.mount / name / file).write_text(f"{limit}\n")

    def v2(self, path, limits, root="/", file="cpu.max"):
        self.groups.append(f"0::{path}")
        self.mounts.append(V2.format(root=root, mount=self.escaped()))
        self.write(limits, file)

    def v1(self, path, limits, controllers="cpu,cpuacct"):
        self.groups += ["7:memory:/elsewhere", f"3:{controllers}:{path}"]
        self.mounts.append(V1.format(mount=self.escaped(), controllers=controllers))
        self.write({name: quota for name, (quota, _) in limits.items()}, "cpu.cfs_quota_us")
        self.write({name: period for name, (_, period) in limits.items()}, "cpu.cfs_period_us")

    def v1_memory(self, path, limits, controllers="memory"):
        self.groups += ["3:cpu:/elsewhere", f"7:{controllers}:{path}"]
        self.mounts.append(V1.format(mount=self.escaped(), controllers=controllers))
        self.write(limits, "memory.limit_in_bytes")

    def read(self, function):
        (self.folder / "cgroup").write_text("".join(line + "\n" for line in self.groups))
        (self.folder / "mountinfo").write_text("".join(line + "\n" for line in self.mounts))
        return function(str(self.folder))

    def processors(self):
        return self.read(_cgroup.processors)

    def memory(self):
        return self.read(_cgroup.memory)


@pytest.fixture
def tree(tmp_path):
    return Tree(tmp_path)


@pytest.mark.parametrize(
    ("limit", "processors"),
    [
        ("max 100000", None),
        ("100000 100000", 1),
        ("250000 100000", 2),  # rounded down
        ("399999 100000", 3),
        ("50000 100000", 1),  # at least 1
        ("1000 100000", 1),
        ("300000 50000", 6),
        ("", None),
        ("200000", None),
        ("two 100000", None),
        ("200000 0", None),
        ("-1 100000", None),
    ],
)
def test_v2(tree, limit, processors):
    tree.v2("/a.slice/b.scope", {"a.slice/b.scope": limit})
    assert tree.processors() == processors


@pytest.mark.parametrize(
    ("quota", "period", "processors"),
    [(-1, 100000, None), (200000, 100000, 2), (350000, 100000, 3), (20000, 100000, 1), (0, 100000, None), (1, 0, None)],
)
def test_v1(tree, quota, period, processors):
    tree.v1("/docker/1234", {"docker/1234": (quota, period)})
    assert tree.processors() == processors


def test_the_groups_above_count_too(tree):
    tree.v2("/a/b/c", {"a": "200000 100000", "a/b": "max 100000", "a/b/c": "800000 100000", "x": "100000 100000"})
    assert tree.processors() == 2


def test_the_group_in_which_everything_is(tree):
    tree.v2("/", {".": "300000 100000"})
    assert tree.processors() == 3


def test_a_container_sees_its_own_group_as_the_top(tree):
    """The path names the group on the host, of which only a part is mounted."""
    tree.v2("/docker/1234/inner", {".": "200000 100000", "inner": "500000 100000"}, root="/docker/1234")
    assert tree.processors() == 2


def test_a_path_outside_of_what_is_mounted(tree):
    tree.v2("/other", {".": "200000 100000"}, root="/docker/1234")
    assert tree.processors() == 2
    tree.groups[-1] = "0::/../.."
    assert tree.processors() == 2


@pytest.mark.parametrize("controllers", ["cpu", "cpuacct,cpu", "cpuset,cpu,cpuacct"])
def test_v1_with_other_controllers_beside(tree, controllers):
    tree.v1("/", {".": (200000, 100000)}, controllers)
    assert tree.processors() == 2


def test_v1_of_other_controllers_is_not_read(tree):
    tree.v1("/", {".": (200000, 100000)}, "cpuacct")
    assert tree.processors() is None


def test_both_versions(tree, tmp_path):
    """The smaller one: systems in between mount both, with the cpu controller in one of them."""
    tree.v1("/a", {"a": (400000, 100000)})
    tree.mount = tmp_path / "unified"
    tree.mount.mkdir()
    tree.v2("/b", {"b": "300000 100000"})
    assert tree.processors() == 3


@pytest.mark.parametrize(
    ("limit", "memory"), [("max", None), ("1073741824", 2**30), ("", None), ("-1", None), ("1 GiB", None), ("0", 0)]
)
def test_memory(tree, limit, memory):
    tree.v2("/a", {"a": limit}, file="memory.max")
    assert tree.memory() == memory
    assert tree.processors() is None


@pytest.mark.parametrize("controllers", ["memory", "memory,hugetlb"])
def test_memory_v1(tree, controllers):
    tree.v1_memory("/a/b", {"a": 5000000, "a/b": 9223372036854771712}, controllers)
    assert tree.memory() == 5000000  # the groups above count too
    assert tree.processors() is None


def test_memory_of_other_controllers_is_not_read(tree):
    tree.v1_memory("/", {".": 5000000}, "cpu")
    assert tree.memory() is None


def test_no_files(tmp_path):
    assert _cgroup.processors(str(tmp_path)) is None
    assert _cgroup.memory(str(tmp_path)) is None


@pytest.mark.parametrize("cgroup", ["", "rubbish\n", "0::/a\n", "\x00\n", "a:b:c:d\n"])
@pytest.mark.parametrize("mountinfo", ["", "rubbish\n", "1 2 3 - cgroup2 x y\n", "1 2 3 / /nowhere - cgroup2 x\n"])
def test_files_of_another_kind(tmp_path, cgroup, mountinfo):
    (tmp_path / "cgroup").write_text(cgroup)
    (tmp_path / "mountinfo").write_text(mountinfo)
    assert _cgroup.processors(str(tmp_path)) is None
    assert _cgroup.memory(str(tmp_path)) is None


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "cgroup").write_bytes(b"0::/\xff\xfe\n")
    (tmp_path / "mountinfo").write_bytes(b"\xff\n")
    assert _cgroup.processors(str(tmp_path)) is None


def test_this_process():
    assert _cgroup.processors() is None or _cgroup.processors() >= 1
    assert _cgroup.memory() is None or _cgroup.memory() > 0
