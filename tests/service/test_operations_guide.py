"""service/operations/README.md: what it has an operator copy is what works."""

import configparser
import re
from pathlib import Path

GUIDE = Path(__file__).parents[2] / "service/operations/README.md"


def test_the_unit_survives_what_jobs_and_it_itself_go_through() -> None:
    (text,) = re.findall(r"```ini\n(.*?)```", GUIDE.read_text(), flags=re.DOTALL)
    unit = configparser.ConfigParser()
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read_string(text)
    service = unit["Service"]
    assert service["KillMode"] == "process", "jobs outlive it"
    assert "PrivateTmp" not in service, "their /tmp too"
    # Each closes /dev/nvidia* to local jobs: systemd 249, as in Ubuntu 22.04, takes ProtectClock for a DeviceAllow.
    assert not {"ProtectClock", "PrivateDevices", "DeviceAllow"} & service.keys()
    # A unit that has failed five times in ten seconds is not started again, unless it says so.
    assert (service["Restart"], unit["Unit"]["StartLimitIntervalSec"]) == ("always", "0")
    assert unit["Unit"]["After"] == unit["Unit"]["Wants"], "an order alone has nothing started"
    assert int(service["LimitNOFILE"]) > 1024, "connections, followed logs, the database"
    assert (service["NoNewPrivileges"], service["ProtectSystem"]) == ("yes", "full")
