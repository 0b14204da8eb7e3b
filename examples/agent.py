"""An agent that has a computer: a sandbox that is still there next time.

    python3 agent.py "Write a program that prints the first ten primes, and run it"
    python3 agent.py "Now make it print twenty"

It needs the package `e2b`, and these variables of the environment:

    E2B_API_URL, E2B_SANDBOX_URL, E2B_API_KEY   where the sandboxes are
    OPENAI_BASE_URL, OPENAI_API_KEY             where the model is; any server that speaks
    OPENAI_MODEL                                OpenAI's chat completions will do
    AGENT_NAME                                  whose sandbox it is; default: agent
"""

import json
import os
import sys
import urllib.error
import urllib.request

from e2b import CommandExitException, Sandbox, SandboxException, SandboxQuery, TimeoutException

# A model that has not come to an end after so many answers is not going to.
MAX_STEPS = 30
COMMAND_SECONDS = 60
# What a tool says goes into the model's context, and that is small.
MAX_OUTPUT = 8000

INSTRUCTIONS = (
    "You have a Linux computer, which you use through your tools. Files stay there from one "
    "conversation to the next. Do what the user asks, check that it worked, and then report."
)


def tool(name, description, **parameters):
    """A tool, described as the model has to see it; all parameters are text."""
    properties = {key: {"type": "string", "description": text} for key, text in parameters.items()}
    schema = {"type": "object", "properties": properties, "required": list(parameters)}
    return {
        "type": "function",
        "function": {"name": name, "description": description, "parameters": schema},
    }


TOOLS = [
    tool("run_command", "Runs a command line in a shell.", command="the command line"),
    tool("read_file", "Reads a text file.", path="where it is"),
    tool(
        "write_file",
        "Writes a text file, in place of one that is there.",
        path="where it shall be",
        content="all that shall be in it",
    ),
]


def open_sandbox(name):
    """The agent's sandbox as it was left, or a new one."""
    found = Sandbox.list(query=SandboxQuery(metadata={"agent": name})).next_items()
    if found:
        return Sandbox.connect(found[0].sandbox_id)
    # Should this program die, the sandbox is put to sleep and not lost.
    return Sandbox.create(metadata={"agent": name}, lifecycle={"on_timeout": "pause"})


def shortened(text):
    """The text without its middle, if it is long: what matters is at the ends."""
    if len(text) <= MAX_OUTPUT:
        return text
    half = MAX_OUTPUT // 2
    return f"{text[:half]}\n[{len(text) - 2 * half} characters left out]\n{text[-half:]}"


def run_command(sandbox, command):
    try:
        done = sandbox.commands.run(command, timeout=COMMAND_SECONDS)
    except CommandExitException as failed:
        done = failed  # it ended with another code than 0, which the model wants to know
    except TimeoutException:
        return f"error: it took longer than {COMMAND_SECONDS} seconds, and was killed"
    return f"{done.stdout}{done.stderr}\n[exit code {done.exit_code}]"


def read_file(sandbox, path):
    return sandbox.files.read(path)


def write_file(sandbox, path, content):
    sandbox.files.write(path, content)
    return f"wrote {path}"


def use_tool(sandbox, call):
    """Does what the model asked for. What goes wrong is told to the model, not to us."""
    run = {"run_command": run_command, "read_file": read_file, "write_file": write_file}
    try:
        name, arguments = call["function"]["name"], json.loads(call["function"]["arguments"])
        print(f"  {name} {next(iter(arguments.values()), '')}", file=sys.stderr)
        return shortened(run[name](sandbox, **arguments))
    except KeyError:
        return "error: there is no such tool"
    except (ValueError, AttributeError, TypeError) as wrong:
        return f"error: these are not the tool's arguments: {wrong}"
    except SandboxException as failed:
        return f"error: {failed}"


def ask_model(messages):
    """What the model says next."""
    request = urllib.request.Request(
        os.environ["OPENAI_BASE_URL"].rstrip("/") + "/chat/completions",
        json.dumps(
            {"model": os.environ["OPENAI_MODEL"], "messages": messages, "tools": TOOLS}
        ).encode(),
        {
            "Content-Type": "application/json",
            "Authorization": "Bearer " + os.environ["OPENAI_API_KEY"],
        },
    )
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            return json.load(answer)["choices"][0]["message"]
    except urllib.error.HTTPError as refused:
        sys.exit(f"the model answers {refused.code}: {refused.read().decode(errors='replace')}")


def work(sandbox, task):
    """The loop: the model asks for tools, and sees what they said, until it has an answer."""
    messages = [
        {"role": "system", "content": INSTRUCTIONS},
        {"role": "user", "content": task},
    ]
    for _ in range(MAX_STEPS):
        said = ask_model(messages)
        messages.append(said)
        if not said.get("tool_calls"):
            return said["content"]
        for call in said["tool_calls"]:
            result = use_tool(sandbox, call)
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": result})
    sys.exit(f"no answer after {MAX_STEPS} steps")


def main():
    if len(sys.argv) != 2:
        sys.exit('usage: agent.py "what is to be done"')
    sandbox = open_sandbox(os.environ.get("AGENT_NAME", "agent"))
    try:
        print(work(sandbox, sys.argv[1]))
    finally:
        sandbox.pause()  # it costs nothing now, and is there next time


if __name__ == "__main__":
    main()
