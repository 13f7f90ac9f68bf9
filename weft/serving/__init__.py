"""Answer requests over HTTP with a model that a job of worker processes holds.

decoder      what a model that decodes for many requests looks like: Request, Decoder
channel      JSON lines between the server and rank 0
driver       the loop of every rank: the same orders at the same step
job          the process that starts the ranks, and what each of them runs
launcher     that process, from the server's side
pulse        whether the ranks get on
workers      the server's end of the job: start it, hear it, start it again
scheduler    which requests are decoded now, and which wait
tokenizer    text to tokens and back
growth       text that grows token by token, and where stop strings end it
protocol     the bodies of OpenAI's routes
refusal      an answer that is an error
limits       who may ask, and how much
completion   one request, from its body to its answer
metrics      what Prometheus reads
app          the routes
server       all of it, listening
load         clients that measure a server
"""
