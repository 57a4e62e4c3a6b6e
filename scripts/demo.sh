#!/usr/bin/env bash
# Builds everything and compares turbo3 and turbo4 with f16, q8_0 and q4_0 on the built-in model.
# A bare Debian machine without a GPU is enough. First run: about 10 minutes on 2 cores; after that, one.

source "$(dirname "$0")/common.sh"

setup_system
setup_venv ""
setup_build turbokv-tools

say "Perplexity and KL divergence from f16, for every cache"
measure=(turbokv kld --ctx 1024 --chunks 4 --cache f16,q8_0,q4_0,turbo4,turbo3,turbo2,tbq3,q8_0/turbo3 --json build/demo.json)
"${measure[@]}"
echo "Written to build/demo.json by: ${measure[*]}"

say "llama-server --cache-type-k turbo3 --cache-type-v turbo3"
python scripts/demo_server.py

say "Next"
cat <<'EOF'
On a model of yours:
  source .venv/bin/activate
  turbokv recommend -m model.gguf --ctx 32768 --memory 24GiB
  turbokv kld -m model.gguf -c 4096 --chunks 8 --cache f16,q8_0,turbo4,turbo4/turbo3
  turbokv sweep -m model.gguf --task kld,needle,speed -o sweep && turbokv report sweep -o report.html
  turbokv serve -m model.gguf -- --cache-type-k turbo3 --cache-type-v turbo3 --port 8080
What is built, and which lines were added to llama.cpp: turbokv doctor
All tests: scripts/test.sh
EOF
