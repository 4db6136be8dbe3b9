# Passes a table of `prmoe plan` on, and adds the money that the run costs at `price` a chip-hour.
# Fails if the step does not fit.
{ print; fflush() }
/^fits$/ { fits = 1 }
/ chip-hours$/ { hours = $(NF - 1); gsub(",", "", hours) }
END {
  if (NR && !fits) {
    print "the step does not fit these chips; nothing was started" > "/dev/stderr"
    exit 2
  }
  if (hours && price) {
    printf "at %s a chip-hour: %.0f, without evaluations, restarts and waiting\n", price, hours * price
  } else if (hours) {
    print "PRICE=… (of a chip for an hour) turns chip-hours into money"
  }
}
