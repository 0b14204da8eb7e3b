#!/bin/sh
# Runs agent.py with the scripted model, against the daemon that E2B_API_URL,
# E2B_SANDBOX_URL and E2B_API_KEY name. PYTHON is one that has the package e2b.
set -eu
here=$(dirname "$0")
python=${PYTHON:-python3}

folder=$(mktemp -d)
mkfifo "$folder/url"
"$python" "$here/scripted_model.py" > "$folder/url" &
model=$!
trap 'kill $model 2> /dev/null || true; rm -r "$folder"' EXIT
read -r OPENAI_BASE_URL < "$folder/url"
OPENAI_API_KEY=scripted
OPENAI_MODEL=scripted
# One name for each run, so that a run begins with a new computer.
AGENT_NAME="test-$$-$(date +%s)"
export OPENAI_BASE_URL OPENAI_API_KEY OPENAI_MODEL AGENT_NAME

says() {
    said=$("$python" "$here/agent.py" "$1")
    [ "$said" = "$2" ] || { echo "agent.py said '$said', not '$2'" >&2; exit 1; }
}
says "Write sum.sh, which prints the sum of the numbers from 1 to 10." "sum.sh prints 55."
says "Run sum.sh again." "It is still 55."
echo "agent.py: ok"
