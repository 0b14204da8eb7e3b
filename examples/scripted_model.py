"""A model that always says the same, for tests of the agents in this folder.

It speaks as much of OpenAI's chat completions as they use. There is a script for
each of two tasks, and it goes by what it is sent: how many answers it has given in
this conversation, and whether each tool said what it must have said. If not, it
answers 400 with what was wrong, and the agent ends with that.

    python3 scripted_model.py        prints its base URL, then serves until it is ended

The first task has a bug in it that the agent must see and mend. The second one only
works if the computer of the first is still there.
"""

import http.server
import json

FIRST_TASK = "Write sum.sh, which prints the sum of the numbers from 1 to 10."
SECOND_TASK = "Run sum.sh again."

WRONG = 'total=0\nfor n in 1 2 3 4 5 6 7 8 9; do total=$((total + n)); done\necho "sum: $total"\n'
RIGHT = WRONG.replace("8 9;", "8 9 10;")


def write(content):
    return "write_file", {"path": "work/sum.sh", "content": content}


def read(path):
    return "read_file", {"path": path}


def run(command):
    return "run_command", {"command": command}


# What the model says in turn: tools that it calls, each with what the tool must
# say (all of these texts, in this order); at last its answer.
SCRIPTS = {
    FIRST_TASK: [
        [(read("work/nothing"), ["error"])],
        [(write(WRONG), ["wrote"])],
        [(run("sh work/sum.sh"), ["sum: 45", "exit code 0"])],
        [(read("work/sum.sh"), [WRONG])],
        [(write(RIGHT), ["wrote"]), (run("sh work/sum.sh && exit 3"), ["sum: 55", "exit code 3"])],
        [(("run_command", {"wrong": "argument"}), ["error"]), (("fly", {}), ["error"])],
        [(run("seq 100000"), ["1\n2\n", "left out", "\n100000\n", "exit code 0"])],
        "sum.sh prints 55.",
    ],
    SECOND_TASK: [
        [(run("sh work/sum.sh"), ["sum: 55", "exit code 0"])],
        "It is still 55.",
    ],
}


class Wrong(Exception):
    """The agent has sent something else than it should have."""


def require(holds, what):
    if not holds:
        raise Wrong(what)


def ids(turn, calls):
    return [f"call_{turn}_{at}" for at in range(len(calls))]


def check_results(turn, calls, results):
    """Whether the tools called in a turn said what they must."""
    require(
        [result.get("tool_call_id") for result in results] == ids(turn, calls),
        f"after turn {turn} there must be the results of its {len(calls)} calls, in their order",
    )
    for ((name, _), expected), result in zip(calls, results):
        said, at = result["content"], 0
        for text in expected:
            at = said.find(text, at)
            require(at >= 0, f"turn {turn}: {name} must say {expected}, and said: {said}")
            at += len(text)


def next_answer(request):
    """What the script says next, if all that was before is as it should be."""
    tools = {tool["function"]["name"] for tool in request["tools"]}
    require(tools == {"run_command", "read_file", "write_file"}, f"these are the tools: {tools}")
    system, user, *rest = request["messages"]
    require(system["role"] == "system", "the first message must be the instructions")
    require(user["content"] in SCRIPTS, f"there is no script for the task {user['content']!r}")
    script = SCRIPTS[user["content"]]

    turn = 0
    while rest:
        said, calls = rest.pop(0), script[turn]
        require(said == spoken(turn, calls), f"turn {turn} is not what was said then: {said}")
        check_results(turn, calls, rest[: len(calls)])
        del rest[: len(calls)]
        turn += 1
    return spoken(turn, script[turn])


def spoken(turn, says):
    """The model's message of one turn."""
    if isinstance(says, str):
        return {"role": "assistant", "content": says}
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": id,
                "type": "function",
                "function": {"name": name, "arguments": json.dumps(arguments)},
            }
            for id, ((name, arguments), _) in zip(ids(turn, says), says)
        ],
    }


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            require(self.path == "/v1/chat/completions", f"there is no {self.path}")
            require(self.headers.get("Authorization") == "Bearer scripted", "the key is 'scripted'")
            answer = {"choices": [{"index": 0, "message": next_answer(json.loads(body))}]}
            self.answer(200, answer)
        except Wrong as wrong:
            self.answer(400, {"error": {"message": str(wrong)}})
        except (KeyError, IndexError, TypeError, ValueError) as odd:
            self.answer(400, {"error": {"message": f"not a request as it should be: {odd!r}"}})

    def answer(self, status, content):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


if __name__ == "__main__":
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        print(f"http://127.0.0.1:{server.server_port}/v1", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            pass
