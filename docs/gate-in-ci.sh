#!/usr/bin/env bash
# Compress, then decide: for any CI that runs a shell. `docs/gate-in-ci.sh RECIPE POLICY OUT [ACCEPTED]`
#
# OUT/run is the compressed model, OUT/gate holds gate.json, gate.xml (JUnit) and gate.md for whoever reads them. ACCEPTED is
# the folder of the last run that was accepted: with it, what it could do may not be lost either.
# Ends with the gate's exit code: 0 pass, 1 regression, 2 the evidence does not decide, 3 a mistake, 4 damaged files.
set -euo pipefail
recipe=$1 policy=$2 out=$3 accepted=${4:-}

# The recipe's own gate may fail too; the verdict below is the one that counts, and says everything in one place.
compress run "$recipe" --out "$out/run" --quiet > /dev/null || [ $? -le 2 ]

original=$(compress report "$out/run" --json --quiet | python3 -c 'import json, sys; print(json.load(sys.stdin)["baseline"]["name"])')
exec compress gate "$out/run" --baseline "$original" ${accepted:+--baseline "$accepted"} --policy "$policy" --out "$out/gate"
