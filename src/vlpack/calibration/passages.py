"""Built-in calibration texts of many kinds, used in addition to the texts that the model generates.

Each consists of a question and a passage that answers it. They include descriptions of pictures, text in pictures,
code, tables and chats, in several languages. Embedding models and rerankers do not generate text; they are calibrated
on these passages and on pictures only.
"""

from __future__ import annotations

PASSAGES: tuple[tuple[str, str], ...] = (
    (
        "a street market in the morning",
        "The photo shows a narrow street lined with wooden stalls under striped awnings. In the "
        "foreground a woman in a green apron arranges oranges into a pyramid; behind her two men "
        "unload crates from a blue van. Wet cobblestones reflect the low sun, and a bicycle leans "
        "against a lamp post on the right edge of the frame.",
    ),
    (
        "Which chart shows the share of wind power?",
        "Figure 3: Electricity by source, 2010 to 2024, in per cent. The orange line (coal) falls "
        "from 41 to 17, the blue line (wind) rises from 6 to 29 and crosses it in 2020. Bars at "
        "the bottom give the total in terawatt hours; the axis on the left runs from 0 to 50. "
        "Source: national statistics office.",
    ),
    (
        "What is the total on the receipt?",
        "GREEN CORNER CAFE\n14 Mill Lane  Tel. 555-0142\n12/03/2024 13:47  Table 6\n2 x Soup of "
        "the day   9.80\n1 x Cheese sandwich   6.50\n3 x Still water   5.40\nSubtotal   21.70\n"
        "Service 10%   2.17\nTOTAL   23.87\nPaid by card **** 4411\nThank you for your visit!",
    ),
    (
        "How do I merge two sorted lists in Python?",
        "def merge(first, second):\n    merged, i, j = [], 0, 0\n    while i < len(first) and j < "
        "len(second):\n        if first[i] <= second[j]:\n            merged.append(first[i])\n"
        "            i += 1\n        else:\n            merged.append(second[j])\n            j += "
        "1\n    return merged + first[i:] + second[j:]\n\n\nassert merge([1, 4], [2, 3, 9]) == [1, "
        "2, 3, 4, 9]\n",
    ),
    (
        "Warum ist der Himmel blau?",
        "Das Licht der Sonne enthält alle Farben. Auf dem Weg durch die Luft trifft es auf winzige "
        "Teilchen, die kurze Wellen weit stärker ablenken als lange. Deshalb kommt das blaue Licht "
        "von allen Seiten zu uns, während das rote fast geradeaus weiterläuft. Am Abend ist der "
        "Weg länger, und übrig bleibt ein warmes Rot.",
    ),
    (
        "长城有多长？",
        "长城是中国古代的军事防御工程，东起山海关，西至嘉峪关，绵延两万多公里。城墙用砖、石和夯土筑成，每隔一段距离设有烽火台，用来传递消息。今天保存得最好的部分大多建于明代，每年吸引数百万"
        "名游客。",
    ),
    (
        "Comment réserver une table au restaurant ?",
        "Bonjour, je souhaiterais réserver une table pour quatre personnes samedi prochain à vingt "
        "heures, si possible près de la fenêtre. L'un de nous est allergique aux noix ; "
        "pourriez-vous nous dire quels plats conviennent ? Je vous remercie d'avance de votre "
        "réponse et vous souhaite une bonne journée.",
    ),
    (
        "¿Qué se ve en la plaza?",
        "En el centro de la plaza hay una fuente redonda con cuatro leones de piedra. Varios niños "
        "corren detrás de las palomas mientras sus abuelos conversan a la sombra de un naranjo. Al "
        "fondo se levanta una iglesia de ladrillo cuyo reloj marca las seis y diez, y en la "
        "esquina un músico toca la guitarra.",
    ),
    (
        "日本の四季について",
        "日本には春、夏、秋、冬の四つの季節があります。春には桜が咲き、人々は公園で花見を楽しみます。夏は蒸し暑く、各地で花火大会が開かれます。秋になると山の木々が赤や黄色に色づき、冬には北"
        "の地方で雪が深く積もります。",
    ),
    (
        "Что лежит на столе?",
        "На столе у окна лежат раскрытая книга, очки в тонкой оправе и связка ключей. Рядом стоит "
        "стеклянная чашка с чаем, от которой поднимается пар. За окном идёт снег, и на подоконнике "
        "дремлет серая кошка. На стене висит карта мира с красными булавками.",
    ),
    (
        "Which planets are larger than the Earth?",
        "| Planet | Radius (km) | Moons |\n| --- | ---: | ---: |\n| Mercury | 2440 | 0 |\n| Venus "
        "| 6052 | 0 |\n| Earth | 6371 | 1 |\n| Mars | 3390 | 2 |\n| Jupiter | 69911 | 95 |\n| "
        "Saturn | 58232 | 146 |\n| Uranus | 25362 | 28 |\n| Neptune | 24622 | 16 |\n",
    ),
    (
        "difference between TCP and UDP",
        "TCP opens a connection, numbers every byte and sends again what was lost, so that data "
        "arrive whole and in order; that costs a round trip before the first byte and delays when "
        "a packet is missing. UDP sends single datagrams and promises nothing. Calls and games "
        "prefer it, since a late packet is of no use to them.",
    ),
    (
        "ten customers with the highest sales",
        "SELECT c.id, c.name, SUM(o.amount) AS total\nFROM customers AS c\nJOIN orders AS o ON "
        "o.customer_id = c.id\nWHERE o.created_at >= DATE '2024-01-01'\nGROUP BY c.id, c.name\n"
        "HAVING SUM(o.amount) > 0\nORDER BY total DESC\nLIMIT 10;\n",
    ),
    (
        "What did the user ask for?",
        "User: My train was cancelled. What can I do?\nAssistant: You can take the next train with "
        "the same ticket, or ask for your money back at the counter or in the app.\nUser: And if "
        "the next one is tomorrow?\nAssistant: Then the company must pay for a night in a hotel. "
        "Keep the receipt and a photo of the departures board.",
    ),
    (
        "a settings file of a web server",
        '{\n  "server": {"host": "127.0.0.1", "port": 8080, "workers": 4},\n  "logging": {"level": '
        '"info", "file": null},\n  "limits": {"body_bytes": 1048576, "timeout_seconds": 30.0},\n  '
        '"features": ["search", "export"],\n  "debug": false\n}\n',
    ),
    (
        "How does photosynthesis work?",
        "Plants take in carbon dioxide through small openings in their leaves and water through "
        "their roots. In the chloroplasts light splits water into oxygen, which leaves the plant, "
        "and hydrogen, whose energy builds sugar from carbon dioxide: 6 CO2 + 6 H2O -> C6H12O6 + 6 "
        "O2. At night the plant burns part of the sugar again.",
    ),
    (
        "a sign at the entrance of a park",
        "RIVERSIDE PARK\nOpen daily 7 am - 9 pm\nDogs on a lead, please\nNO SWIMMING - STRONG "
        "CURRENT\nBicycles: use the marked path\nIn an emergency call 112 and give the number of "
        "the nearest lamp: 27\nCity Council, Parks & Gardens",
    ),
    (
        "A train leaves at 9:40 and arrives at 13:05. How long does it travel?",
        "From 9:40 to 10:00 are 20 minutes. From 10:00 to 13:00 are 3 hours. From 13:00 to 13:05 "
        "are 5 minutes. Together that is 3 hours and 25 minutes, or 205 minutes. At an average of "
        "96 kilometres per hour the train covers 96 * 205 / 60 = 328 kilometres.",
    ),
    (
        "the lighthouse keeper and the dog",
        "When the storm was over, the keeper found a wet brown dog on the lowest step of the "
        'lighthouse. It had no collar "You may stay until somebody asks for you," he said, and '
        "gave it half of his fish. Nobody ever asked. Every evening from then on the two climbed "
        "the hundred and twelve steps together to light the lamp.",
    ),
    (
        "제주도의 날씨",
        "제주도는 한국의 남쪽에 있는 큰 섬으로 겨울에도 비교적 따뜻하다. "
        "섬 한가운데에는 한라산이 솟아 있고, 해안을 따라 "
        "검은 현무암 바위가 이어진다. 봄에는 유채꽃이 들판을 노랗게 물들이고 여름에는 많은 사람들이 바다를 찾는다.",
    ),
    (
        "ما هي فوائد القراءة؟",
        "تساعد القراءة على توسيع المعرفة وتنمية الخيال، كما تحسن اللغة وتزيد القدرة على التركيز. "
        "ومن يقرأ كل يوم ولو نصف ساعة يلاحظ بعد أشهر قليلة أن مفرداته أصبحت أغنى وأن كتابته صارت "
        "أوضح.",
    ),
    (
        "a page layout in HTML",
        '<article class="card">\n  <h2>Opening hours</h2>\n  <ul>\n    <li>Monday to Friday: '
        "<time>09:00</time> - <time>18:00</time></li>\n    <li>Saturday: <time>10:00</time> - "
        '<time>14:00</time></li>\n  </ul>\n  <a href="/contact">Contact us</a>\n</article>\n',
    ),
    (
        "What should a rental contract contain?",
        "1. Names and addresses of landlord and tenant. 2. The flat: floor, rooms, cellar, keys. "
        "3. Rent and service charges, the day on which they are due, and the account. 4. The "
        "deposit, at most three months' rent. 5. Notice: three months to the end of a month. 6. "
        "Repairs and small damages. 7. Signatures, place and date.",
    ),
    (
        "a mountain lake at sunset",
        "A calm lake fills the lower half of the image and mirrors a jagged ridge whose snow is "
        "pink in the last light. A red canoe with two people lies left of the centre; thin mist "
        "hovers above the far shore. Dark firs frame the picture on both sides. The sky turns from "
        "deep blue at the top to orange above the peaks.",
    ),
    (
        "Como fazer uma sopa de legumes?",
        "Corte duas cenouras, uma batata grande, um alho-poró e meia cebola em pedaços pequenos. "
        "Refogue tudo em azeite durante cinco minutos, junte um litro de água e uma colher de chá "
        "de sal e deixe cozinhar em fogo baixo por vinte e cinco minutos. No fim, acrescente salsa "
        "picada e sirva com pão.",
    ),
    (
        "find the bug in this C function",
        "#include <stddef.h>\n\n/* The index of the largest of n values; n must not be 0. */\n"
        "size_t largest(const int *values, size_t n) {\n    size_t best = 0;\n    for (size_t i = "
        "1; i < n; ++i) {\n        if (values[i] > values[best]) {\n            best = i;\n        "
        "}\n    }\n    return best;\n}\n",
    ),
)
