"""Who may do what: tokens, scopes of every route, sessions of browsers, other sites' pages."""

import hashlib
import json
import stat
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response

from service.api import job_routes, model_routes, operations, service_routes, stream_routes
from service.api.access import Access, is_loopback
from service.api.faults import ForbiddenError, status_of
from service.api.limits import Buckets
from service.api.sessions import COOKIE, LIFETIME_S, Sessions
from service.api.tokens import SCOPES, Tokens
from service.errors import BackendError, ConfigError, StorageError
from service.jobs.settings import ServiceSettings
from tests.service.api_shelf import Served, served, spec

# Whoever reaches the service may ask these.
OPEN = {("GET", "/healthz"), ("GET", "/readyz"), ("GET", "/v1/openapi.json")}
STILL = partial(Buckets, clock=lambda: 0.0)  # No time goes by, however slow this machine is.
ROUTES = [
    route
    for part in (job_routes, stream_routes, model_routes, service_routes, operations)
    for route in part.router.routes
    if isinstance(route, APIRoute)
]


@pytest.fixture
def here(place: str, tmp_path: Path) -> Iterator[Served]:
    with served(tmp_path, place) as service:
        yield service


def needed(route: APIRoute) -> str | None:
    """The scope that a route's rule asks for."""
    scopes = {scope for inner in route.dependant.dependencies if (scope := getattr(inner.call, "scope", None))}
    assert len(scopes) <= 1, route.path
    return scopes.pop() if scopes else None


def request(method: str = "GET", client: str = "127.0.0.1", **headers: str) -> Request:
    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    url = {"scheme": "http", "server": ("localhost", 80), "path": "/", "query_string": b""}
    return Request({"type": "http", "method": method, "headers": raw, "client": (client, 1), **url})


def cookie_of(response: Response) -> str:
    return response.headers["set-cookie"].split(";")[0].removeprefix(f"{COOKIE}=")


def test_a_token_is_kept_as_its_hash_alone_in_a_file_that_only_we_read(tmp_path: Path) -> None:
    tokens = Tokens(tmp_path / "state" / "tokens.json")
    assert not tokens.were_made
    made = tokens.create("ci", "submit")
    assert made.startswith("lorot_")
    assert len(made) >= len("lorot_") + 43
    kept = json.loads(tokens.path.read_text())
    assert kept == {"ci": {"sha256": hashlib.sha256(made.encode()).hexdigest(), **kept["ci"]}}
    assert kept["ci"].keys() == {"sha256", "scopes", "created"}
    assert kept["ci"]["scopes"] == ["read", "submit"]
    assert made not in tokens.path.read_text()
    assert stat.S_IMODE(tokens.path.stat().st_mode) == 0o600
    assert not list(tokens.path.parent.glob("*.writing"))


def test_a_token_is_found_by_all_of_it_and_by_nothing_else(tmp_path: Path) -> None:
    tokens = Tokens(tmp_path / "tokens.json")
    made = {name: tokens.create(name, "read") for name in ("ann", "ben")}
    for name, token in made.items():
        found = tokens.find(token)
        assert found is not None
        assert found.name == name
    for wrong in ("", made["ann"][:-1], made["ann"] + "x", made["ann"].upper(), "ann", "\ud800"):
        assert tokens.find(wrong) is None


def test_another_process_makes_and_revokes_tokens_that_count_at_once(tmp_path: Path) -> None:
    ours, theirs = Tokens(tmp_path / "tokens.json"), Tokens(tmp_path / "tokens.json")
    assert ours.list() == []
    token = theirs.create("late", "read")
    assert ours.find(token) is not None
    theirs.revoke("late")
    assert ours.find(token) is None
    assert ours.were_made


def test_tokens_that_are_made_at_once_are_all_kept(tmp_path: Path) -> None:
    def make(number: int) -> None:
        Tokens(tmp_path / "tokens.json").create(f"n{number}", "read")

    threads = [threading.Thread(target=make, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(Tokens(tmp_path / "tokens.json").list()) == 12


@pytest.mark.parametrize("name", ["", "local", "a/b", "two words", "-a", "x" * 65, "a\n", "ä"])
def test_names_that_would_confuse_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="token name"):
        Tokens(tmp_path / "tokens.json").create(name, "read")


def test_a_name_is_given_once_and_a_scope_must_be_one(tmp_path: Path) -> None:
    tokens = Tokens(tmp_path / "tokens.json")
    tokens.create("ci", "read")
    with pytest.raises(ConfigError, match="revoke it first"):
        tokens.create("ci", "read")
    with pytest.raises(ConfigError, match="none of read, submit, admin"):
        tokens.create("b", "root")
    with pytest.raises(ConfigError, match="there are ci"):
        tokens.revoke("b")


@pytest.mark.parametrize("content", ["", "[]", "{", '{"a": 1}', '{"a": {"sha256": "x", "scopes": [], "created": ""}}'])
def test_a_damaged_file_lets_nobody_in(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokens.json").write_text(content)
    access = Access(ServiceSettings(state=tmp_path))
    assert not access.is_open
    for headers in ({"authorization": "Bearer lorot_x"}, {"cookie": f"{COOKIE}=ann|1|x|y"}):
        with pytest.raises(BackendError) as caught:
            access.identify(request(**headers))
        assert status_of(caught.value) == 503
        assert str(tmp_path) not in str(caught.value)
    with pytest.raises(ConfigError, match=r"tokens\.json"):
        access.check_start()


def test_a_damaged_file_is_told_to_the_log_and_not_to_clients(
    here: Served, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    headers = here.token("ann", "read")
    here.access.tokens.path.write_text("{")
    answer = here.client.get("/v1/jobs", headers=headers)
    assert (answer.status_code, "retry-after" in answer.headers) == (503, True)
    assert "tokens.json" not in answer.text
    assert str(tmp_path) not in answer.text
    assert any("tokens.json" in str(getattr(one, "fields", "")) for one in caplog.records)


def test_people_behind_one_proxy_are_counted_by_their_sessions(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.api.guard.Buckets", STILL)
    with served(tmp_path, place, limits={"requests_per_minute": 3}) as here:
        here.token("ann", "read")
        here.token("ben", "read")
        cookies = [here.access.sessions.open(token) for token in here.access.tokens.list()]
        found = {}
        for cookie in (*cookies, "ann|1|forged|forged"):
            headers = {"cookie": f"{COOKIE}={cookie}"}
            found[cookie] = [here.client.get("/v1/jobs", headers=headers).status_code for _ in range(4)]
        assert found[cookies[0]] == found[cookies[1]] == [200, 200, 200, 429]
        assert found["ann|1|forged|forged"] == [401, 401, 401, 429]
        # A forged session is nobody's: it takes nothing from the one that it names.
        assert here.access.client_of(request(cookie=f"{COOKIE}=ann|1|x|y")) == "address 127.0.0.1"


def test_every_route_has_a_rule_or_is_meant_to_be_open(here: Served) -> None:
    described = {
        (method.upper(), path)
        for path, operations_ in here.client.get("/v1/openapi.json").json()["paths"].items()
        for method in operations_
    }
    seen = {
        (method, route.path_format): needed(route) for route in ROUTES for method in (route.methods or set()) - {"HEAD"}
    }
    assert described == seen.keys(), "a router that this test does not look at"
    assert {place for place, scope in seen.items() if scope is None} == OPEN - {("GET", "/v1/openapi.json")}
    assert set(seen.values()) == {None, *SCOPES}


@pytest.mark.parametrize("has", [None, *SCOPES])
@pytest.mark.parametrize("route", ROUTES, ids=lambda route: f"{sorted(route.methods)[0]} {route.path}")
def test_each_route_lets_in_whom_its_scope_allows(shared: Served, route: APIRoute, has: str | None) -> None:
    scope, method = needed(route), sorted(route.methods or ())[0]
    path = route.path_format.replace("{job_id}", "000000").replace("{name}", "none").replace("{version}", "1")
    headers = {} if has is None else {"Authorization": f"Bearer {TOKENS[has]}"}
    if path == "/v1/events" and has is not None:
        # It has no end here; its rule is the one of the other routes that read.
        assert scope == "read"
        return
    status = shared.client.request(method, path, headers=headers).status_code
    if scope is None:
        assert status not in (401, 403)
    elif has is None:
        assert status == 401
    elif SCOPES.index(has) < SCOPES.index(scope):
        assert status == 403
    else:
        assert status not in (401, 403)


TOKENS: dict[str, str] = {}


@pytest.fixture(scope="module")
def shared(empty_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A service with a token of each scope, for all the requests that change nothing."""
    folder = tmp_path_factory.mktemp("access")
    (folder / "mlflow.db").write_bytes(empty_database.read_bytes())
    with served(folder, f"sqlite:///{folder}/mlflow.db", limits={"requests_per_minute": 100_000}) as service:
        TOKENS.update({scope: service.access.tokens.create(f"of-{scope}", scope) for scope in SCOPES})
        yield service


def test_ones_own_jobs_need_submit_and_those_of_others_admin(here: Served) -> None:
    ann, ben, root = here.token("ann", "submit"), here.token("ben", "submit"), here.token("root", "admin")
    job = here.submit(ann)["id"]
    assert here.client.get(f"/v1/jobs/{job}", headers=ben).status_code == 200
    for action in ("cancel", "retry", "resume"):
        answer = here.client.post(f"/v1/jobs/{job}/{action}", headers=ben)
        assert answer.status_code == 403
        assert "'ann'" in answer.json()["error"]["message"]
    assert here.desk.get(job).state == "queued"
    assert here.client.post(f"/v1/jobs/{job}/cancel", headers=ann).status_code == 200
    assert here.client.post(f"/v1/jobs/{job}/retry", headers=root).json()["owner"] == "ann"


def test_on_loopback_the_first_token_ends_the_free_use(here: Served) -> None:
    assert here.client.get("/v1/jobs").status_code == 200
    token = here.token("first", "read")
    answer = here.client.get("/v1/jobs")
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"].startswith("Bearer")
    assert here.client.get("/v1/jobs", headers=token).status_code == 200
    # Also when the last one is gone: rather nobody than everybody.
    here.access.tokens.revoke("first")
    assert here.client.get("/v1/jobs").status_code == 401


def test_off_loopback_nothing_begins_without_a_token(tmp_path: Path) -> None:
    settings = ServiceSettings(state=tmp_path)
    for host in ("0.0.0.0", "::", "192.168.1.4", "gpu-box"):
        with pytest.raises(ConfigError, match="lorot token create"):
            Access(settings, host=host).check_start()
        assert not Access(settings, host=host).is_open
    for host in ("127.0.0.1", "::1", "localhost", "127.0.0.9"):
        Access(settings, host=host).check_start()
    Tokens(tmp_path / "tokens.json").create("ci", "read")
    Access(settings, host="0.0.0.0").check_start()


def test_names_that_look_like_this_machine_are_not(tmp_path: Path) -> None:
    assert not any(is_loopback(host) for host in ("localhost.evil.example", "127.0.0.1.evil.example", "", "0", "[::2]"))
    assert is_loopback("[::1]")


def test_what_came_through_a_proxy_is_not_this_machines_user(here: Served) -> None:
    for header in ("X-Forwarded-For", "Forwarded", "X-Real-IP"):
        assert here.client.get("/v1/jobs", headers={header: "10.0.0.1"}).status_code == 401


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://localhost:9999"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
def test_another_sites_page_cannot_make_a_browser_submit_or_stop_jobs(here: Served, headers: dict[str, str]) -> None:
    job = here.submit()["id"]
    assert here.client.post(f"/v1/jobs/{job}/cancel", headers=headers).status_code == 403
    assert here.client.post("/v1/jobs", json={"spec": spec()}, headers=headers).status_code == 403
    assert here.desk.get(job).state == "queued"
    own = {"Origin": "http://localhost", "Sec-Fetch-Site": "same-origin"}
    assert here.client.post(f"/v1/jobs/{job}/cancel", headers=own).status_code == 200


def test_a_session_stands_for_its_token_and_changes_things_with_the_forms_word_only(here: Served) -> None:
    secret = here.access.tokens.create("ann", "submit")
    response = Response()
    with pytest.raises(ForbiddenError):
        here.access.sign_in(request("POST", origin="http://evil.example", host="localhost"), response, secret)
    assert here.access.sign_in(request("POST"), response, f" {secret}\n").name == "ann"
    told = response.headers["set-cookie"].lower()
    assert "httponly" in told
    assert "samesite=strict" in told
    assert secret not in told
    cookie = cookie_of(response)
    cookies = {"cookie": f"{COOKIE}={cookie}"}
    assert here.access.identify(request(**cookies)).name == "ann"
    word = here.access.csrf(request(**cookies))
    with pytest.raises(ForbiddenError):
        here.access.identify(request("POST", **cookies))
    with pytest.raises(ForbiddenError):
        here.access.identify(request("POST", **cookies), csrf=word[:-1] + "g")
    assert here.access.identify(request("POST", **cookies), csrf=word).may("submit")
    assert here.access.identify(request("POST", **cookies, x_csrf_token=word)).name == "ann"
    with pytest.raises(ForbiddenError):
        here.access.identify(request("POST", **cookies, origin="http://evil.example", host="localhost"), csrf=word)


def test_a_session_ends_with_its_token_its_time_and_the_sign_out(tmp_path: Path) -> None:
    tokens, sessions = Tokens(tmp_path / "tokens.json"), Sessions(tmp_path / "key")
    tokens.create("ann", "read")
    [token] = tokens.list()
    cookie = sessions.open(token, now_s=1000.0)
    assert sessions.holds(cookie, token, now_s=1000.0 + LIFETIME_S - 1)
    assert not sessions.holds(cookie, token, now_s=1000.0 + LIFETIME_S + 1)
    assert Sessions(tmp_path / "key").holds(cookie, token, now_s=1001.0), "a restart of the service ends no session"
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600
    tokens.revoke("ann")
    tokens.create("ann", "admin")
    assert not sessions.holds(cookie, tokens.list()[0], now_s=1001.0)
    mine = sessions.open(token)
    other = sessions.open(token)
    sessions.close(mine)
    assert not sessions.holds(mine, token)
    again = Sessions(tmp_path / "key")
    assert (again.holds(mine, token), again.holds(other, token)) == (False, True), "nor after a restart"
    again.close(other)
    assert not any(Sessions(tmp_path / "key").holds(cookie, token) for cookie in (mine, other))
    for damaged in ("{", "[1]", '{"a": []}'):
        (tmp_path / "key.closed").write_text(damaged)
        assert Sessions(tmp_path / "key").holds(other, token), "what cannot be read ends nothing else"


def test_a_key_that_was_cut_short_signs_nothing(tmp_path: Path) -> None:
    tokens = Tokens(tmp_path / "tokens.json")
    tokens.create("ann", "read")
    (tmp_path / "key").write_bytes(b"short")
    with pytest.raises(StorageError, match="no key of 32 bytes"):
        Sessions(tmp_path / "key").open(tokens.list()[0])


def test_a_session_that_was_tampered_with_is_none(tmp_path: Path) -> None:
    tokens, sessions = Tokens(tmp_path / "tokens.json"), Sessions(tmp_path / "key")
    tokens.create("ann", "read")
    tokens.create("root", "admin")
    ann, root = tokens.list()
    name, expires, nonce, signature = sessions.open(ann).split("|")
    for forged in (
        f"root|{expires}|{nonce}|{signature}",
        f"{name}|{int(expires) + 9999}|{nonce}|{signature}",
        f"{name}|{expires}|{nonce}|",
        f"{name}|{expires}|{nonce}|{'ä' * 64}",
    ):
        assert not sessions.holds(forged, ann)
        assert not sessions.holds(forged, root)


def test_wrong_tokens_are_counted_by_address_and_right_ones_are_still_let_in(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.api.access.Buckets", STILL)
    with served(tmp_path, place, limits={"failures_per_minute": 3}) as here:
        right = here.token("ann", "read")
        wrong = {"Authorization": "Bearer lorot_wrong"}
        found = [here.client.get("/v1/jobs", headers=wrong) for _ in range(5)]
        assert [answer.status_code for answer in found] == [401, 401, 401, 429, 429]
        assert int(found[-1].headers["retry-after"]) >= 1
        assert here.client.get("/v1/jobs", headers=right).status_code == 200


def test_all_addresses_that_one_client_may_take_are_counted_together(here: Served) -> None:
    one = {here.access.client_of(request(client=f"2001:db8:7:1::{number:x}")) for number in range(1, 5)}
    other = here.access.client_of(request(client="2001:db8:7:2::1"))
    assert len({*one, other}) == 2
    # As a socket for both kinds has it.
    mapped = here.access.client_of(request(client="::ffff:10.0.0.1"))
    assert mapped == here.access.client_of(request(client="10.0.0.1"))
    assert mapped != here.access.client_of(request(client="::ffff:10.0.0.2"))


@pytest.mark.parametrize("credentials", ["Basic bG9yb3Q6", "Bearer", "Bearer ", "lorot_x", "bearer lorot_x y"])
def test_what_is_no_token_is_refused_even_where_none_is_needed(here: Served, credentials: str) -> None:
    assert here.client.get("/v1/jobs", headers={"Authorization": credentials}).status_code == 401


def test_tokens_are_made_listed_and_revoked_over_http(here: Served) -> None:
    root = here.token("root", "admin")
    made = here.client.post("/v1/tokens", json={"name": "ci", "scope": "submit"}, headers=root)
    assert made.status_code == 201
    secret = made.json()["token"]
    ci = {"Authorization": f"Bearer {secret}"}
    assert here.client.get("/v1/jobs", headers=ci).status_code == 200
    listed = here.client.get("/v1/tokens", headers=root)
    assert [token["name"] for token in listed.json()["tokens"]] == ["ci", "root"]
    assert secret not in listed.text
    assert here.client.delete("/v1/tokens/ci", headers=root).status_code == 204
    assert here.client.get("/v1/jobs", headers=ci).status_code == 401
    assert here.client.delete("/v1/tokens/ci", headers=root).status_code == 404


def test_a_bucket_fills_evenly_and_holds_a_minutes_worth() -> None:
    now = [0.0]
    buckets = Buckets(60, clock=lambda: now[0])
    assert [buckets.take("a") for _ in range(60)] == [0.0] * 60
    assert buckets.take("a") == pytest.approx(1.0)
    assert buckets.take("b") == 0.0
    now[0] = 0.5
    assert buckets.take("a") == pytest.approx(0.5)
    now[0] = 1.0
    assert buckets.take("a") == 0.0
    assert buckets.take("a") == pytest.approx(1.0)
    now[0] = 1e6
    assert sum(not buckets.take("a") for _ in range(100)) == 60


def test_clients_without_number_take_no_memory_without_bound() -> None:
    buckets = Buckets(60)
    for number in range(10_050):
        buckets.take(str(number))
    assert len(buckets._left) == 10_000
